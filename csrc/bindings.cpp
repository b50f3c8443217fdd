// The only file that knows Python: addresses in, the GIL released, C++ exceptions out. Every argument was checked by
// the op's file in pykd/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>

#include "cpu/dispatch.h"
#include "cpu/memory.h"

namespace py = pybind11;

namespace {

template <class T>
T* address(std::uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

std::int64_t kl_div(std::uintptr_t student, std::uintptr_t teacher, std::uintptr_t labels, std::uintptr_t scale,
                    std::uintptr_t losses, std::uintptr_t gradient, std::int64_t rows, std::int64_t student_classes,
                    std::int64_t teacher_classes, std::int64_t student_stride, std::int64_t teacher_stride,
                    int student_dtype, int teacher_dtype, int direction, double beta,
                    double temperature, double kl_weight, double ce_weight, double label_smoothing, int threads) {
  std::int64_t failure = -1;
  pykd::KlDivArgs args{};
  args.student = address<const void>(student);
  args.teacher = address<const void>(teacher);
  args.labels = address<const std::int64_t>(labels);
  args.scale = address<const float>(scale);
  args.losses = address<float>(losses);
  args.gradient = address<void>(gradient);
  args.failure = &failure;
  args.rows = rows;
  args.student_classes = student_classes;
  args.teacher_classes = teacher_classes;
  args.student_stride = student_stride;
  args.teacher_stride = teacher_stride;
  args.student_dtype = student_dtype;
  args.teacher_dtype = teacher_dtype;
  args.direction = direction;
  args.beta = beta;
  args.temperature = temperature;
  args.kl_weight = kl_weight;
  args.ce_weight = ce_weight;
  args.label_smoothing = label_smoothing;
  args.threads = threads;
  pykd::table().kl_div(args);
  if (failure == -2) throw std::bad_alloc();
  return failure;
}

}  // namespace

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
  m.def(
      "advise_huge_pages",
      [](std::uintptr_t memory, std::size_t bytes) { pykd::advise_huge_pages(address<void>(memory), bytes); },
      py::arg("memory"), py::arg("bytes"), "Ask for huge pages in freshly allocated memory.");
  m.def("kl_div", &kl_div, py::call_guard<py::gil_scoped_release>(), py::arg("student"), py::arg("teacher"),
        py::arg("labels"), py::arg("scale"), py::arg("losses"), py::arg("gradient"), py::arg("rows"),
        py::arg("student_classes"), py::arg("teacher_classes"), py::arg("student_stride"), py::arg("teacher_stride"),
        py::arg("student_dtype"), py::arg("teacher_dtype"), py::arg("direction"),
        py::arg("beta"), py::arg("temperature"), py::arg("kl_weight"), py::arg("ce_weight"),
        py::arg("label_smoothing"), py::arg("threads"),
        "Distillation losses and gradient of rows of logits; returns -1 or the first row with a label out of range.");
  pykd::isa();  // an impossible PYKD_ISA is an error at import, not at the first call
}
