// The only file that knows Python: addresses in, the GIL released, C++ exceptions out. Every argument was checked by
// the op's file in pykd/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>

#include "cpu/dispatch.h"
#include "cpu/sparse_pack.h"
#include "cpu/sparse_panels.h"

namespace py = pybind11;

namespace {

template <class T>
T* address(std::uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

std::int64_t kl_div(std::uintptr_t student, std::uintptr_t teacher, std::uintptr_t labels, std::uintptr_t scale,
                    std::uintptr_t losses, std::uintptr_t gradient, std::int64_t rows, std::int64_t student_classes,
                    std::int64_t teacher_classes, std::int64_t student_stride, std::int64_t teacher_stride,
                    int student_dtype, int teacher_dtype, int direction, double beta, double temperature,
                    double kl_weight, double ce_weight, double label_smoothing, int threads) {
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

std::int64_t kl_div_topk(std::uintptr_t student, std::uintptr_t ids, std::uintptr_t log_probs, std::uintptr_t labels,
                         std::uintptr_t scale, std::uintptr_t losses, std::uintptr_t gradient, std::int64_t rows,
                         std::int64_t classes, std::int64_t kept, std::int64_t student_stride, int student_dtype,
                         int teacher_dtype, bool tail, double temperature, double power, double kl_weight,
                         double ce_weight, double label_smoothing, int threads) {
  std::int64_t failure = -1;
  pykd::KlDivTopkArgs args{};
  args.student = address<const void>(student);
  args.ids = address<const std::int64_t>(ids);
  args.log_probs = address<const void>(log_probs);
  args.labels = address<const std::int64_t>(labels);
  args.scale = address<const float>(scale);
  args.losses = address<float>(losses);
  args.gradient = address<void>(gradient);
  args.failure = &failure;
  args.rows = rows;
  args.classes = classes;
  args.kept = kept;
  args.student_stride = student_stride;
  args.student_dtype = student_dtype;
  args.teacher_dtype = teacher_dtype;
  args.tail = tail;
  args.temperature = temperature;
  args.power = power;
  args.kl_weight = kl_weight;
  args.ce_weight = ce_weight;
  args.label_smoothing = label_smoothing;
  args.threads = threads;
  pykd::table().kl_div_topk(args);
  if (failure == -2) throw std::bad_alloc();
  return failure;
}

using Numbers = std::vector<int64_t>;

// Seven whole numbers a layer: packed, bias, in_features, out_features, bias_dtype, activation, input_zero.
pykd::Packed8bit packed_8bit(const Numbers& numbers, float input_scale) {
  if (numbers.size() != 7) throw std::invalid_argument("a linear layer of encoder_layer_8bit is seven numbers");
  return {address<uint8_t>(numbers[0]), address<void>(numbers[1]),    numbers[2],  numbers[3],
          static_cast<int>(numbers[4]), static_cast<int>(numbers[5]), input_scale, static_cast<int>(numbers[6])};
}

void bind_encoder(py::module_& m) {
  m.def("attention_scratch", &pykd::attention_scratch, py::arg("length"), py::arg("dim"));
  m.def(
      "attention",
      [](uintptr_t q, uintptr_t k, uintptr_t v, int64_t q_stride, int64_t k_stride, int64_t v_stride, uintptr_t bias,
         uintptr_t y, uintptr_t scratch, int64_t batch, int64_t length, int64_t heads, int64_t dim, float scale,
         int threads) {
        pykd::table().attention({address<float>(q), address<float>(k), address<float>(v), q_stride, k_stride, v_stride,
                                 address<float>(bias), address<float>(y), address<float>(scratch), batch, length, heads,
                                 dim, scale, threads});
      },
      py::call_guard<py::gil_scoped_release>(), "softmax(scale q k^T + bias) v of every head: see AttentionArgs.");
  m.def(
      "add_norm",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t y, int64_t rows, int64_t size,
         float eps, int threads) {
        pykd::table().add_norm({address<float>(x), address<float>(residual), address<float>(weight),
                                address<float>(bias), address<float>(y), rows, size, eps, threads});
      },
      py::call_guard<py::gil_scoped_release>(), "Layer normalisation of x + residual: see AddNormArgs.");
  m.def("encoder_layer_8bit_scratch", &pykd::encoder_layer_8bit_scratch);
  m.def(
      "encoder_layer_8bit",
      [](uintptr_t x, uintptr_t bias, uintptr_t y, uintptr_t scratch, const std::vector<Numbers>& linears,
         const std::vector<float>& input_scales, const Numbers& norms, const std::vector<float>& eps, int64_t batch,
         int64_t length, int64_t hidden, int64_t heads, int64_t dim, int64_t neurons, float scale, int threads) {
        if (linears.size() != 6 || input_scales.size() != 6 || norms.size() != 4 || eps.size() != 2)
          throw std::invalid_argument("encoder_layer_8bit takes six linear layers and two normalisations");
        pykd::EncoderLayer8bitArgs args{};
        args.x = address<float>(x);
        args.bias = address<float>(bias);
        args.y = address<float>(y);
        args.scratch = address<float>(scratch);
        pykd::Packed8bit* const layers[] = {&args.query, &args.key, &args.value, &args.mix, &args.up, &args.down};
        for (size_t i = 0; i < 6; ++i) *layers[i] = packed_8bit(linears[i], input_scales[i]);
        for (size_t i = 0; i < 2; ++i) {
          args.norm_weight[i] = address<float>(norms[2 * i]);
          args.norm_bias[i] = address<float>(norms[2 * i + 1]);
          args.eps[i] = eps[i];
        }
        args.batch = batch;
        args.length = length;
        args.hidden = hidden;
        args.heads = heads;
        args.dim = dim;
        args.neurons = neurons;
        args.scale = scale;
        args.threads = threads;
        const py::gil_scoped_release released;
        pykd::table().encoder_layer_8bit(args);
      },
      "A post-norm encoder layer of w8a8 linear layers: see EncoderLayer8bitArgs.");
}

void bind_sparse(py::module_& m) {
  using Address = uintptr_t;
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def(
      "sparse_linear",
      [](Address x, Address bitmask, Address values, Address offsets, Address tail, Address bias, Address y,
         int64_t rows, int64_t in_features, int64_t out_features, int64_t x_stride, int64_t tail_row, int value_dtype,
         int threads) {
        pykd::table().sparse_linear({address<float>(x), address<uint8_t>(bitmask), address<void>(values),
                                     address<int64_t>(offsets), address<void>(tail), address<float>(bias),
                                     address<float>(y), rows, in_features, out_features, x_stride, tail_row,
                                     value_dtype, threads});
      },
      release);
  m.def(
      "sparse_panels",
      [](Address x, Address pack, Address bias, Address scratch, Address y, int64_t rows, int64_t in_features,
         int64_t out_features, int64_t x_stride, int threads) {
        pykd::table().sparse_panels({address<float>(x), address<uint8_t>(pack), address<float>(bias),
                                     address<float>(scratch), address<float>(y), rows, in_features, out_features,
                                     x_stride, threads});
      },
      release);
  m.def(
      "bitmask_offsets",
      [](Address bitmask, int64_t in_features, int64_t out_features, Address offsets) {
        return pykd::bitmask_offsets(address<uint8_t>(bitmask), in_features, out_features, address<int64_t>(offsets));
      },
      release);
  m.def("sparse_panels_scratch", &pykd::sparse_panels_scratch);
  m.def(
      "sparse_panels_bytes",
      [](Address bitmask, int64_t in_features, int64_t out_features, int64_t tile, int packing) {
        return pykd::sparse_panels_bytes(address<uint8_t>(bitmask), in_features, out_features, tile, packing);
      },
      release);
  m.def(
      "sparse_panels_pack",
      [](Address bitmask, Address values, Address offsets, int64_t in_features, int64_t out_features, int64_t tile,
         int packing, Address pack) {
        pykd::sparse_panels_pack(address<uint8_t>(bitmask), address<void>(values), address<int64_t>(offsets),
                                 in_features, out_features, tile, packing, address<uint8_t>(pack));
      },
      release);
  m.def(
      "sparse_codes_unpack",
      [](Address pack, int64_t in_features, int64_t out_features, Address dense) {
        pykd::sparse_pack_check(address<uint8_t>(pack), in_features, out_features, pykd::codes_packing());
        pykd::sparse_codes_unpack(address<uint8_t>(pack), address<int8_t>(dense));
      },
      release);
  m.def("codes_packing", &pykd::codes_packing);
  m.def("sparse_8bit_scratch", &pykd::sparse_8bit_scratch);
  m.def(
      "sparse_8bit",
      [](Address x, int64_t x_stride, Address pack, Address scales, Address bias, Address y, Address scratch,
         int64_t rows, int64_t in_features, int64_t out_features, int activation, int dtype, int bias_dtype,
         int threads) {
        pykd::sparse_pack_check(address<uint8_t>(pack), in_features, out_features, pykd::codes_packing());
        pykd::table().sparse_8bit({address<void>(x), x_stride, address<uint8_t>(pack), address<float>(scales),
                                   address<void>(bias), address<void>(y), address<float>(scratch), rows, in_features,
                                   out_features, activation, dtype, bias_dtype, threads});
      },
      release);
  m.def(
      "sparse_4bit",
      [](Address x, Address bitmask, Address codes, Address offsets, Address scales, Address table, Address bias,
         Address y, int64_t in_features, int64_t out_features, int64_t group_size, int zero_code, int activation,
         int dtype, int bias_dtype, int threads) {
        pykd::table().sparse_4bit({address<float>(x), address<uint8_t>(bitmask), address<uint8_t>(codes),
                                   address<int64_t>(offsets), address<void>(scales), address<float>(table),
                                   address<void>(bias), address<void>(y), in_features, out_features, group_size,
                                   zero_code, activation, dtype, bias_dtype, threads});
      },
      release);
  const auto bind_transfer = [&](const char* name, bool expand) {
    m.def(
        name,
        [expand](Address bitmask, Address offsets, Address values, Address dense, int64_t in_features,
                 int64_t out_features, int element_size, int threads) {
          const pykd::BitmaskArgs args = {address<uint8_t>(bitmask),
                                          address<int64_t>(offsets),
                                          address<void>(values),
                                          address<void>(dense),
                                          in_features,
                                          out_features,
                                          element_size,
                                          threads};
          expand ? pykd::table().bitmask_expand(args) : pykd::table().bitmask_gather(args);
        },
        release);
  };
  bind_transfer("bitmask_expand", true);
  bind_transfer("bitmask_gather", false);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of pykd.";
  m.attr("version") = PYKD_VERSION;
  m.def("isa", &pykd::isa, "Name of the instruction-set level in force.");
  m.def("set_isa", &pykd::set_isa, py::arg("name"), "Use another level that this CPU can run.");
  m.def("isa_levels", &pykd::isa_levels, "The levels that this CPU can run, lowest first.");
  m.def("kl_div", &kl_div, py::call_guard<py::gil_scoped_release>(), py::arg("student"), py::arg("teacher"),
        py::arg("labels"), py::arg("scale"), py::arg("losses"), py::arg("gradient"), py::arg("rows"),
        py::arg("student_classes"), py::arg("teacher_classes"), py::arg("student_stride"), py::arg("teacher_stride"),
        py::arg("student_dtype"), py::arg("teacher_dtype"), py::arg("direction"), py::arg("beta"),
        py::arg("temperature"), py::arg("kl_weight"), py::arg("ce_weight"), py::arg("label_smoothing"),
        py::arg("threads"),
        "Distillation losses and gradient of rows of logits; returns -1 or the first row with a label out of range.");
  m.def("kl_div_topk", &kl_div_topk, py::call_guard<py::gil_scoped_release>(), py::arg("student"), py::arg("ids"),
        py::arg("log_probs"), py::arg("labels"), py::arg("scale"), py::arg("losses"), py::arg("gradient"),
        py::arg("rows"), py::arg("classes"), py::arg("kept"), py::arg("student_stride"), py::arg("student_dtype"),
        py::arg("teacher_dtype"), py::arg("tail"), py::arg("temperature"), py::arg("power"), py::arg("kl_weight"),
        py::arg("ce_weight"), py::arg("label_smoothing"), py::arg("threads"),
        "Distillation losses and gradient from kept classes; returns -1, the first row with a label out of range, or "
        "rows + the first row with an id out of range.");
  bind_sparse(m);
  m.attr("linear_small_scratch") = pykd::kSmallScratch;
  m.attr("linear_4bit_rows") = pykd::kLinear4bitRows;
  m.attr("linear_4bit_fold") = pykd::kLinear4bitFold;
  m.def(
      "linear_4bit",
      [](uintptr_t x, int64_t x_stride, uintptr_t packed, uintptr_t codebook, uintptr_t bias, uintptr_t y,
         uintptr_t scratch, int64_t rows, int64_t in_features, int64_t out_features, int64_t group_size, int code,
         bool wide_scales, bool rounds, int activation, int dtype, int bias_dtype, int threads) {
        pykd::Linear4bitArgs args{};
        args.x = reinterpret_cast<const void*>(x);
        args.x_stride = x_stride;
        args.packed = reinterpret_cast<const uint8_t*>(packed);
        args.codebook = reinterpret_cast<const float*>(codebook);
        args.bias = reinterpret_cast<const void*>(bias);
        args.y = reinterpret_cast<void*>(y);
        args.scratch = reinterpret_cast<float*>(scratch);
        args.rows = rows;
        args.in_features = in_features;
        args.out_features = out_features;
        args.group_size = group_size;
        args.code = code;
        args.wide_scales = wide_scales;
        args.activation = activation;
        args.dtype = dtype;
        args.bias_dtype = bias_dtype;
        args.threads = threads;
        rounds ? pykd::table().linear_4bit_rounded(args) : pykd::table().linear_4bit(args);
      },
      py::call_guard<py::gil_scoped_release>(),
      "y = x W^T + bias for a weight in layout int4_r16, x rounded to int8 or not: see Linear4bitArgs.");
  m.attr("linear_8bit_rows") = pykd::kLinear8bitRows;
  m.attr("linear_8bit_features") = pykd::kLinear8bitFeatures;
  m.def(
      "linear_8bit",
      [](uintptr_t x, int64_t x_stride, uintptr_t packed, uintptr_t bias, uintptr_t y, uintptr_t scratch, int64_t rows,
         int64_t in_features, int64_t out_features, bool rounds, int activation, int dtype, int bias_dtype, int threads,
         float input_scale, int input_zero) {
        pykd::table().linear_8bit({address<void>(x), x_stride, address<uint8_t>(packed), address<void>(bias),
                                   address<void>(y), address<float>(scratch), rows, in_features, out_features, rounds,
                                   activation, dtype, bias_dtype, threads, input_scale, input_zero, 0});
      },
      py::call_guard<py::gil_scoped_release>(),
      "y = x W^T + bias for a weight in layout int8_r16: see Linear8bitArgs.");
  bind_encoder(m);
  pykd::isa();  // an impossible PYKD_ISA is an error at import, not at the first call
}
