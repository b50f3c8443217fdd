#include "cuda/launchers.h"
