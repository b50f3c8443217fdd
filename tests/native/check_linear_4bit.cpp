// linear_4bit against a plain matrix product, over weights laid out here as pykd/ops/int4_r16.py describes.
#include <cmath>
#include <cstring>

#include "check.h"

namespace check {
namespace {

using pykd::Linear4bitArgs;

constexpr int64_t kStrip = 32;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Weight {
  int64_t out, in, group, groups;
  int code;
  bool wide;                          // float32 scales
  std::vector<float> wide_scales;     // [out, groups]
  std::vector<uint8_t> codes, zeros;  // [out, in], [out, groups]
  std::vector<uint16_t> scales;       // float16 [out, groups]
  float codebook[16];

  Weight(Random& random, int64_t out_features, int64_t in_features, int64_t group_size, int kind, bool wide_ones)
      : out(out_features), in(in_features), group(std::min(group_size, in_features)), code(kind), wide(wide_ones) {
    groups = (in + group - 1) / group;
    for (int64_t i = 0; i < out * in; ++i) codes.push_back(static_cast<uint8_t>(random.below(16)));
    for (int64_t i = 0; i < out * groups; ++i) {
      zeros.push_back(static_cast<uint8_t>(random.below(16)));
      wide_scales.push_back(static_cast<float>(random.normal() * random.pick<double>({0.01, 1.0, 1e-9})));
      scales.push_back(encode_half(pykd::kFloat16, random.normal() * random.pick<double>({0.01, 1.0, 1e-6})));
    }
    for (float& level : codebook) level = static_cast<float>(random.normal());
  }

  size_t at(int64_t row, int64_t column, int64_t columns) const { return static_cast<size_t>(row * columns + column); }

  double value(int64_t row, int64_t column) const {
    const size_t g = at(row, column / group, groups);
    const int c = codes[at(row, column, in)];
    const double level = code == pykd::kInt4 ? c - 8 : code == pykd::kUint4 ? c - zeros[g] : codebook[c];
    return level * (wide ? wide_scales[g] : decode_half(pykd::kFloat16, scales[g]));
  }

  int64_t padded(int64_t g) const { return round_up(g + 1 < groups ? group : in - g * group, 8); }
  int64_t padded_k() const { return (groups - 1) * round_up(group, 8) + padded(groups - 1); }
  int64_t folds() const {  // what linear_4bit_rounded keeps notes of
    const int64_t most = pykd::kLinear4bitFold;
    return (groups - 1) * (round_up(padded(0), most) / most) + round_up(padded(groups - 1), most) / most;
  }
  int64_t scale_bytes() const { return wide ? 4 : 2; }
  int64_t zero_bytes() const { return code == pykd::kUint4 ? round_up(groups * kStrip, 64) : 0; }
  int64_t strip_bytes() const { return zero_bytes() + groups * kStrip * scale_bytes() + padded_k() * kStrip / 2; }
  int64_t bytes() const { return round_up(out, kStrip) / kStrip * strip_bytes(); }

  void pack(uint8_t* packed) const {
    std::memset(packed, 0, static_cast<size_t>(bytes()));
    for (int64_t row = 0; row < out; ++row) {
      uint8_t* strip = packed + row / kStrip * strip_bytes();
      uint8_t* block = strip + zero_bytes();
      const int64_t lane = row % kStrip;
      for (int64_t g = 0; g < groups; ++g) {
        if (code == pykd::kUint4) strip[g * kStrip + lane] = zeros[at(row, g, groups)];
        const size_t scale = at(row, g, groups);
        if (wide)
          std::memcpy(block + 4 * lane, &wide_scales[scale], 4);
        else
          std::memcpy(block + 2 * lane, &scales[scale], 2);
        uint8_t* lines = block + scale_bytes() * kStrip;
        for (int64_t k = 0; k < group && g * group + k < in; ++k) {
          uint8_t& byte = lines[k / 8 * 4 * kStrip + 4 * lane + k % 4];
          byte = static_cast<uint8_t>(byte | codes[at(row, g * group + k, in)] << (k % 8 < 4 ? 0 : 4));
        }
        block = lines + padded(g) * kStrip / 2;
      }
    }
  }
};

// Rows of activations as codes times the scale of their group.
void round_groups(const Weight& weight, std::vector<double>* inputs) {
  for (size_t row = 0; row < inputs->size(); row += static_cast<size_t>(weight.in))
    for (int64_t k = 0; k < weight.in; k += weight.group) {
      const auto first = inputs->begin() + static_cast<std::ptrdiff_t>(row) + k;
      const std::vector<double> values(first, first + std::min(weight.group, weight.in - k));
      std::vector<int> codes;
      const float scale = round_row(values, &codes);
      std::transform(codes.begin(), codes.end(), first, [&](int code) { return static_cast<double>(scale) * code; });
    }
}

void run_case(Group& group, Random& random, const Weight& weight, Linear4bitArgs args, bool rounds, bool with_bias) {
  const int64_t rows = args.rows, in = args.in_features, out = args.out_features;
  Buffer x(static_cast<size_t>((rows - 1) * args.x_stride + in) * size_of(args.dtype));
  Buffer packed(static_cast<size_t>(weight.bytes())), codebook(64);
  Buffer bias(static_cast<size_t>(out) * size_of(args.bias_dtype));
  Buffer y(static_cast<size_t>(rows * out) * size_of(args.dtype));
  const int64_t scratch_row = rounds ? weight.padded_k() + 12 * weight.folds() : 4 * weight.padded_k();
  Buffer scratch(static_cast<size_t>(std::min(rows, pykd::kLinear4bitRows) * scratch_row));
  for (int64_t m = 0; m < rows; ++m) {
    const double spread = rounds ? random.pick<double>({1, 1, 30, 1e-3, 0}) : 1;
    for (int64_t k = 0; k < in; ++k) encode(x.data(), m * args.x_stride + k, args.dtype, spread * random.normal());
    if (rounds && random.chance(0.1))
      encode(x.data(), m * args.x_stride + random.below(in), args.dtype, random.pick<double>({HUGE_VAL, std::nan("")}));
  }
  for (int64_t i = 0; i < out; ++i) encode(bias.data(), i, args.bias_dtype, random.normal());
  weight.pack(packed.as<uint8_t>());
  std::memcpy(codebook.data(), weight.codebook, 64);
  args.x = x.data();
  args.packed = packed.as<uint8_t>();
  args.codebook = weight.code == pykd::kCodebook4 ? codebook.as<float>() : nullptr;
  args.bias = with_bias ? bias.data() : nullptr;
  args.wide_scales = weight.wide;
  args.y = y.data();
  const bool small = scratch_row * std::min(rows, pykd::kLinear4bitRows) <= 4 * pykd::kSmallScratch;
  args.scratch = small && with_bias ? nullptr : scratch.as<float>();
  rounds ? pykd::table().linear_4bit_rounded(args) : pykd::table().linear_4bit(args);
  std::vector<double> weights, inputs;
  for (int64_t i = 0; i < out * in; ++i) weights.push_back(weight.value(i / in, i % in));
  for (int64_t i = 0; i < rows * in; ++i)
    inputs.push_back(decode(x.data(), i / in * args.x_stride + i % in, args.dtype));
  if (rounds) round_groups(weight, &inputs);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t i = 0; i < out; ++i) {
      double want = with_bias ? decode(bias.data(), i, args.bias_dtype) : 0, size = std::fabs(want);
      for (int64_t k = 0; k < in; ++k) {
        const double term = weights[static_cast<size_t>(i * in + k)] * inputs[static_cast<size_t>(m * in + k)];
        want += term;
        size += std::fabs(term);
      }
      if (args.activation == pykd::kSilu) want /= 1 + std::exp(-want);  // whose slope is at most 1.1
      group.near("y", m * out + i, decode(y.data(), m * out + i, args.dtype), want,
                 2e-6 * size + epsilon_of(args.dtype) * std::fabs(want) + tiny_of(args.dtype));
    }
  group.intact({&x, &packed, &codebook, &bias, &y, &scratch});
}

struct Shape {
  int64_t rows, out, in, group;
};

}  // namespace

void linear_4bit(const std::string& level) {
  Random random(4);
  // The last has enough rows, outputs and inputs for several decoded slabs.
  const Shape shapes[] = {{1, 1, 1, 32},     {1, 33, 40, 32}, {2, 17, 129, 64}, {3, 31, 7, 32},   {4, 70, 65, 16},
                          {5, 15, 96, 96},   {6, 32, 9, 5},   {7, 16, 64, 13},  {11, 48, 31, 16}, {12, 40, 72, 64},
                          {13, 5, 130, 128}, {25, 65, 20, 8}, {97, 37, 270, 32}};
  for (int kind = 0; kind < 5; ++kind) {
    static const char* const names[] = {"int4", "uint4", "codebook", "int4, int8 inputs", "uint4, int8 inputs"};
    const bool rounds = kind > pykd::kCodebook4;
    const int code = rounds ? kind - 3 : kind;
    for (int dtype = 0; dtype < 3; ++dtype) {
      Group group(level + " linear_4bit " + names[kind] + ", " + name_of(dtype));
      for (const Shape& shape : shapes) {
        Linear4bitArgs args{};
        args.rows = shape.rows;
        args.in_features = shape.in;
        args.out_features = shape.out;
        args.group_size = shape.group;
        args.x_stride = shape.in + random.below(3);
        args.code = code;
        args.activation = random.chance(0.3) ? pykd::kSilu : pykd::kNoActivation;
        args.dtype = dtype;
        args.bias_dtype = static_cast<int>(random.below(3));
        args.threads = static_cast<int>(1 + random.below(2));
        group.begin("%lld rows, %lld outputs, %lld inputs, group %lld, threads %d", static_cast<long long>(shape.rows),
                    static_cast<long long>(shape.out), static_cast<long long>(shape.in),
                    static_cast<long long>(shape.group), args.threads);
        const Weight weight(random, shape.out, shape.in, shape.group, code, random.chance(0.3));
        run_case(group, random, weight, args, rounds, random.chance(0.6));
      }
    }
  }
  Group group(level + " linear_4bit, more rows than are packed at a time");
  for (const bool rounds : {false, true}) {
    group.begin("385 rows, int8 inputs: %d", rounds);
    const Weight weight(random, 3, 9, 8, pykd::kUint4, false);
    Linear4bitArgs args{};
    args.rows = pykd::kLinear4bitRows + 1;
    args.in_features = args.x_stride = 9;
    args.out_features = 3;
    args.group_size = 8;
    args.code = pykd::kUint4;
    args.threads = 2;
    run_case(group, random, weight, args, rounds, true);
  }
}

}  // namespace check
