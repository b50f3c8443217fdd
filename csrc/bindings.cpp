// The only file that knows Python: addresses in, the GIL released, C++ exceptions out. Every argument was checked by
// the op's file in pykd/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of pykd.";
  m.attr("version") = PYKD_VERSION;
#ifdef PYKD_EMULATE_AVX512
  m.attr("emulated") = py::make_tuple("avx512");
#else
  m.attr("emulated") = py::make_tuple();
#endif
  m.def("isa", &pykd::isa, "Name of the instruction-set level in force.");
  m.def("set_isa", &pykd::set_isa, py::arg("name"), "Use another level that this CPU can run.");
  m.def("isa_levels", &pykd::isa_levels, "The levels that this CPU can run, lowest first.");
  pykd::isa();  // an impossible PYKD_ISA is an error at import, not at the first call
}
