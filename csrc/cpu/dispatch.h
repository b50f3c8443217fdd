// Which instruction-set level runs: chosen once at load from cpuid and PYKD_ISA, lowered or raised again by tests.
#pragma once

#include <string>
#include <vector>

#include "ops.h"

namespace pykd {

struct Table {
#define PYKD_FIELD(op, Args) void (*op)(const Args&);
  PYKD_OPS(PYKD_FIELD)
#undef PYKD_FIELD
};

const Table& table();                   // the functions of the level in force
std::string isa();                      // its name
void set_isa(const std::string& name);  // throws std::invalid_argument for a level that this CPU cannot run
std::vector<std::string> isa_levels();  // the levels that this CPU can run, lowest first

}  // namespace pykd
