// linear_8bit against plain integer sums (w8a8, w8a8_static) and plain double-precision products (w8a16), over weights
// laid out here as pykd/ops/int8_r16.py describes.
#include <cmath>
#include <cstring>

#include "check.h"

namespace check {
namespace {

using pykd::Linear8bitArgs;

constexpr int64_t kStrip = 32;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Weight {
  int64_t out, in;
  std::vector<int8_t> codes;  // [out, in]
  std::vector<float> scales;  // [out]

  Weight(Random& random, int64_t out_features, int64_t in_features, bool extreme) : out(out_features), in(in_features) {
    for (int64_t i = 0; i < out * in; ++i)
      codes.push_back(static_cast<int8_t>(extreme ? random.pick<int>({-128, -127, 127}) : random.below(256) - 128));
    for (int64_t i = 0; i < out; ++i)
      scales.push_back(static_cast<float>(random.normal() * random.pick<double>({0.01, 0.001, 1e-6})));
  }

  int code(int64_t row, int64_t k) const { return codes[static_cast<size_t>(row * in + k)]; }
  double scale(int64_t row) const { return scales[static_cast<size_t>(row)]; }
  int64_t strip_bytes() const { return 8 * kStrip + round_up(in, 4) * kStrip; }
  int64_t bytes() const { return round_up(out, kStrip) / kStrip * strip_bytes(); }

  void pack(uint8_t* packed) const {
    std::memset(packed, 0, static_cast<size_t>(bytes()));
    for (int64_t row = 0; row < out; ++row) {
      uint8_t* strip = packed + row / kStrip * strip_bytes();
      const int64_t lane = row % kStrip;
      uint32_t start = 0;
      for (int64_t k = 0; k < in; ++k) {
        start -= 128u * static_cast<uint32_t>(code(row, k));
        strip[8 * kStrip + k / 4 * 4 * kStrip + 4 * lane + k % 4] = static_cast<uint8_t>(code(row, k));
      }
      std::memcpy(strip + 4 * lane, &scales[static_cast<size_t>(row)], 4);
      std::memcpy(strip + 4 * kStrip + 4 * lane, &start, 4);
    }
  }
};

// Codes less the zero point, and their scale: the row's own, or the one that is given.
float round_row(const std::vector<double>& x, const Linear8bitArgs& args, std::vector<int>* codes) {
  const float own = check::round_row(x, codes);
  if (args.input_scale == 0 || std::isnan(own)) return own;
  for (size_t k = 0; k < x.size(); ++k) {
    const double whole = std::nearbyint(static_cast<float>(x[k]) / args.input_scale) + args.input_zero;
    (*codes)[k] = static_cast<int>(std::fmin(std::fmax(whole, -127), 127)) - args.input_zero;
  }
  return args.input_scale;
}

void compare(Group& group, const Weight& weight, const Linear8bitArgs& args, const Buffer& y, const Buffer* bias) {
  std::vector<double> x(static_cast<size_t>(args.in_features));
  std::vector<int> codes;
  for (int64_t m = 0; m < args.rows; ++m) {
    for (int64_t k = 0; k < args.in_features; ++k)
      x[static_cast<size_t>(k)] = decode(args.x, m * args.x_stride + k, args.dtype);
    const float row_scale = round_row(x, args, &codes);
    for (int64_t i = 0; i < args.out_features; ++i) {
      int64_t sum = 0, start = 0;
      double product = 0, size = 0;
      for (int64_t k = 0; k < args.in_features; ++k) {
        const double term = weight.code(i, k) * x[static_cast<size_t>(k)];
        sum += codes[static_cast<size_t>(k)] * weight.code(i, k);
        start += args.input_zero * weight.code(i, k);
        product += term;
        size += std::fabs(term);
      }
      const double linear = (args.rounds ? static_cast<double>(sum) * row_scale : product) * weight.scale(i);
      double want = linear + (bias ? decode(bias->data(), i, args.bias_dtype) : 0);
      const double moved = std::fabs(static_cast<double>(start) * row_scale * weight.scale(i));
      const double allowed = args.rounds ? 6 * 0x1p-24 * (std::fabs(linear) + std::fabs(want) + 2 * moved)
                                         : 2e-6 * (size * std::fabs(weight.scale(i)) + std::fabs(want));
      if (args.activation == pykd::kSilu) want /= 1 + std::exp(-want);  // whose slope is at most 1.1
      group.near("y", m * args.out_features + i, decode(y.data(), m * args.out_features + i, args.dtype), want,
                 allowed + epsilon_of(args.dtype) * std::fabs(want) + 2 * tiny_of(args.dtype));
    }
  }
}

void run_case(Group& group, Random& random, const Weight& weight, Linear8bitArgs args, bool with_bias) {
  const int64_t rows = args.rows, in = args.in_features, packed_in = round_up(in, 4);
  Buffer x(static_cast<size_t>((rows - 1) * args.x_stride + in) * size_of(args.dtype));
  Buffer packed(static_cast<size_t>(weight.bytes()));
  Buffer bias(static_cast<size_t>(args.out_features) * size_of(args.bias_dtype));
  Buffer y(static_cast<size_t>(rows * args.out_features) * size_of(args.dtype));
  Buffer scratch(
      static_cast<size_t>(std::min(rows, pykd::kLinear8bitRows) * (args.rounds ? 4 + packed_in : 4 * packed_in)));
  for (int64_t m = 0; m < rows; ++m) {
    const double spread = random.pick<double>({1, 1, 30, 1e-3, 0});
    for (int64_t k = 0; k < in; ++k) encode(x.data(), m * args.x_stride + k, args.dtype, spread * random.normal());
    if (args.rounds && random.chance(0.1))
      encode(x.data(), m * args.x_stride + random.below(in), args.dtype, random.pick<double>({HUGE_VAL, std::nan("")}));
  }
  for (int64_t i = 0; i < args.out_features; ++i) encode(bias.data(), i, args.bias_dtype, random.normal());
  weight.pack(packed.as<uint8_t>());
  args.x = x.data();
  args.packed = packed.as<uint8_t>();
  args.bias = with_bias ? bias.data() : nullptr;
  args.y = y.data();
  args.scratch = scratch.as<float>();
  pykd::table().linear_8bit(args);
  compare(group, weight, args, y, with_bias ? &bias : nullptr);
  group.intact({&x, &packed, &bias, &y, &scratch});
}

struct Shape {
  int64_t rows, out, in;
};

}  // namespace

void linear_8bit(const std::string& level) {
  Random random(8);
  // The last has enough rows, outputs and inputs for several blocks and decoded slabs.
  const Shape shapes[] = {{1, 1, 1},    {1, 33, 40},  {2, 17, 129}, {3, 31, 7},   {4, 70, 65},
                          {5, 15, 96},  {6, 32, 9},   {7, 16, 64},  {8, 33, 3},   {11, 48, 31},
                          {12, 40, 72}, {13, 5, 130}, {25, 65, 20}, {97, 37, 570}};
  for (int rounds = 0; rounds < 2; ++rounds) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      Group group(level + " linear_8bit " + (rounds ? "w8a8" : "w8a16") + ", " + name_of(dtype));
      for (const Shape& shape : shapes) {
        Linear8bitArgs args{};
        args.rows = shape.rows;
        args.in_features = shape.in;
        args.out_features = shape.out;
        args.x_stride = shape.in + random.below(3);
        args.rounds = rounds;
        if (rounds && random.chance(0.5)) {
          args.input_scale = random.pick<float>({0.02f, 0.5f, 1e-4f});
          args.input_zero = random.pick<int>({0, -127, 90});
        }
        args.activation = random.chance(0.3) ? pykd::kSilu : pykd::kNoActivation;
        args.dtype = dtype;
        args.bias_dtype = static_cast<int>(random.below(3));
        args.threads = static_cast<int>(1 + random.below(2));
        group.begin("%lld rows, %lld outputs, %lld inputs, threads %d", static_cast<long long>(shape.rows),
                    static_cast<long long>(shape.out), static_cast<long long>(shape.in), args.threads);
        const Weight weight(random, shape.out, shape.in, random.chance(0.3));
        run_case(group, random, weight, args, random.chance(0.6));
      }
    }
  }
  Group group(level + " linear_8bit, more rows than are packed at a time");
  for (int rounds = 0; rounds < 2; ++rounds) {
    group.begin("385 rows, %s", rounds ? "w8a8" : "w8a16");
    const Weight weight(random, 3, 9, true);
    Linear8bitArgs args{};
    args.rows = pykd::kLinear8bitRows + 1;
    args.in_features = args.x_stride = 9;
    args.out_features = 3;
    args.rounds = rounds;
    args.threads = 2;
    run_case(group, random, weight, args, true);
  }
}

}  // namespace check
