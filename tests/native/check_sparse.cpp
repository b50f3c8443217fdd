// sparse_linear, sparse_panels, sparse_8bit and sparse_4bit against plain matrix products; bitmask_expand and
// bitmask_gather exactly.
#include <cmath>
#include <cstring>

#include "check.h"
#include "cpu/sparse_pack.h"
#include "cpu/sparse_panels.h"

namespace check {
namespace {

struct Weight {
  int64_t out, in, row_bytes;
  std::vector<uint8_t> bits;     // [out, row_bytes]
  std::vector<int64_t> offsets;  // [out + 1]
  std::vector<double> dense;     // [out, in]
  std::vector<double> values;    // [nnz]

  // alike: so many rows after one another keep the same columns
  Weight(Random& random, int64_t out_features, int64_t in_features, double density, int dtype, int64_t alike = 1)
      : out(out_features), in(in_features), row_bytes((in_features + 7) / 8) {
    bits.assign(static_cast<size_t>(out * row_bytes), 0);
    dense.assign(static_cast<size_t>(out * in), 0);
    for (int64_t row = 0; row < out; ++row) {
      offsets.push_back(static_cast<int64_t>(values.size()));
      for (int64_t column = 0; column < in; ++column) {
        const int64_t model = row / alike * alike;
        if (model < row ? !kept(model, column) : !random.chance(density)) continue;
        uint8_t& byte = bits[static_cast<size_t>(row * row_bytes + column / 8)];
        byte = static_cast<uint8_t>(byte | 1 << column % 8);
        float element[1];
        encode(element, 0, dtype, random.normal());
        values.push_back(decode(element, 0, dtype));
        dense[static_cast<size_t>(row * in + column)] = values.back();
      }
    }
    offsets.push_back(static_cast<int64_t>(values.size()));
  }
  int64_t nnz() const { return static_cast<int64_t>(values.size()); }
  bool kept(int64_t row, int64_t column) const {
    return bits[static_cast<size_t>(row * row_bytes + column / 8)] >> column % 8 & 1;
  }
};

template <class T>
T* put(const Buffer& buffer, const std::vector<T>& from) {
  if (!from.empty()) std::memcpy(buffer.data(), from.data(), from.size() * sizeof(T));
  return buffer.as<T>();
}

void compare(Group& group, const Weight& weight, const float* x, int64_t stride, const float* bias, const float* y,
             int64_t rows) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t row = 0; row < weight.out; ++row) {
      double want = bias ? bias[row] : 0, size = std::fabs(want);
      for (int64_t k = 0; k < weight.in; ++k) {
        const double term = weight.dense[static_cast<size_t>(row * weight.in + k)] * x[m * stride + k];
        want += term;
        size += std::fabs(term);
      }
      group.near("y", m * weight.out + row, y[m * weight.out + row], want, 2e-6 * size);
    }
}

void linear_case(Group& group, Random& random, const Weight& weight, int64_t rows, int dtype) {
  pykd::SparseLinearArgs args{};
  args.x_stride = (weight.in + 15) / 16 * 16 + 16 * random.below(2);
  const int64_t nnz = weight.nnz();
  while (args.tail_row < weight.out && weight.offsets[static_cast<size_t>(args.tail_row + 1)] + 16 <= nnz)
    ++args.tail_row;
  const int64_t tail = weight.offsets[static_cast<size_t>(args.tail_row)];
  Buffer x(static_cast<size_t>(rows * args.x_stride) * 4), bits(weight.bits.size());
  Buffer values(static_cast<size_t>(nnz) * size_of(dtype)), offsets(weight.offsets.size() * 8);
  Buffer tails(static_cast<size_t>(nnz - tail + 16) * size_of(dtype));
  Buffer bias(static_cast<size_t>(weight.out) * 4), y(static_cast<size_t>(rows * weight.out) * 4);
  for (int64_t i = 0; i < rows * args.x_stride; ++i)
    x.as<float>()[i] = i % args.x_stride < weight.in ? static_cast<float>(random.normal()) : 0.0f;
  for (int64_t i = 0; i < weight.out; ++i) bias.as<float>()[i] = static_cast<float>(random.normal());
  for (int64_t i = 0; i < nnz; ++i) encode(values.data(), i, dtype, weight.values[static_cast<size_t>(i)]);
  for (int64_t i = tail; i < nnz + 16; ++i)  // what only pads is NaN: it must never meet an activation
    encode(tails.data(), i - tail, dtype, i < nnz ? weight.values[static_cast<size_t>(i)] : std::nan(""));
  args.x = x.as<float>();
  args.bitmask = put(bits, weight.bits);
  args.values = values.data();
  args.offsets = put(offsets, weight.offsets);
  args.tail = tails.data();
  args.bias = random.chance(0.5) ? bias.as<float>() : nullptr;
  args.y = y.as<float>();
  args.rows = rows;
  args.in_features = weight.in;
  args.out_features = weight.out;
  args.value_dtype = dtype;
  args.threads = static_cast<int>(1 + random.below(2));
  pykd::table().sparse_linear(args);
  compare(group, weight, args.x, args.x_stride, args.bias, args.y, rows);
  group.intact({&x, &bits, &values, &offsets, &tails, &bias, &y});
}

void linear(const std::string& level) {
  Random random(5);
  for (int dtype = 0; dtype < 3; ++dtype) {
    Group group(level + " sparse_linear " + name_of(dtype));
    for (int64_t rows = 1; rows <= 4; ++rows)
      for (const int64_t in : {1, 7, 8, 9, 16, 17, 63, 64, 65, 130, 200}) {
        const double density = random.pick<double>({0.0, 0.1, 0.5, 0.5, 1.0});
        const int64_t out = random.pick<int64_t>({1, 3, 17, 40});
        group.begin("%lld rows, %lld outputs, %lld inputs, density %g", static_cast<long long>(rows),
                    static_cast<long long>(out), static_cast<long long>(in), density);
        linear_case(group, random, Weight(random, out, in, density, dtype), rows, dtype);
      }
  }
}

void panels_case(Group& group, Random& random, const Weight& weight, int64_t rows, int64_t tile, int packing) {
  pykd::SparsePanelsArgs args{};
  args.threads = static_cast<int>(1 + random.below(2));
  args.x_stride = weight.in + random.below(3);
  const int64_t bytes = pykd::sparse_panels_bytes(weight.bits.data(), weight.in, weight.out, tile, packing);
  std::vector<float> values(weight.values.begin(), weight.values.end());
  Buffer x(static_cast<size_t>((rows - 1) * args.x_stride + weight.in) * 4), pack(static_cast<size_t>(bytes));
  Buffer scratch(static_cast<size_t>(pykd::sparse_panels_scratch(rows, weight.in, tile, args.threads)) * 4);
  Buffer bias(static_cast<size_t>(weight.out) * 4), y(static_cast<size_t>(rows * weight.out) * 4);
  for (int64_t i = 0; i < (rows - 1) * args.x_stride + weight.in; ++i)
    x.as<float>()[i] = static_cast<float>(random.normal());
  for (int64_t i = 0; i < weight.out; ++i) bias.as<float>()[i] = static_cast<float>(random.normal());
  std::memset(scratch.data(), 0xff,
              static_cast<size_t>(pykd::sparse_panels_scratch(rows, weight.in, tile, args.threads)) * 4);
  pykd::sparse_panels_pack(weight.bits.data(), values.data(), weight.offsets.data(), weight.in, weight.out, tile,
                           packing, pack.as<uint8_t>());
  args.x = x.as<float>();
  args.pack = pack.as<uint8_t>();
  args.bias = random.chance(0.5) ? bias.as<float>() : nullptr;
  args.scratch = scratch.as<float>();
  args.y = y.as<float>();
  args.rows = rows;
  args.in_features = weight.in;
  args.out_features = weight.out;
  pykd::table().sparse_panels(args);
  compare(group, weight, args.x, args.x_stride, args.bias, args.y, rows);
  group.intact({&x, &pack, &scratch, &bias, &y});
}

void panels(const std::string& level) {
  Random random(6);
  for (const int64_t tile : {8, 128, 255}) {
    Group group(level + " sparse_panels, tiles of " + std::to_string(tile));
    for (const int packing : {pykd::kPairs, pykd::kQuads})
      for (const int64_t rows : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 70}) {
        const int64_t out = random.pick<int64_t>({1, 5, 16, 127, 128, 150}),
                      in = random.pick<int64_t>({1, 9, 16, 127, 129});
        const double density = random.pick<double>({0.0, 0.05, 0.2, 0.6});
        group.begin("packing %d, %lld rows, %lld outputs, %lld inputs, density %g", packing,
                    static_cast<long long>(rows), static_cast<long long>(out), static_cast<long long>(in), density);
        const Weight weight(random, out, in, density, pykd::kFloat32, packing == pykd::kQuads ? 4 : 1);
        panels_case(group, random, weight, rows, tile, packing);
      }
  }
}

void compare_codes(Group& group, const Weight& weight, const std::vector<int8_t>& codes,
                   const pykd::Sparse8bitArgs& args) {
  std::vector<double> x(static_cast<size_t>(weight.in));
  std::vector<int> rounded;
  for (int64_t m = 0; m < args.rows; ++m) {
    for (int64_t k = 0; k < weight.in; ++k)
      x[static_cast<size_t>(k)] = decode(args.x, m * args.x_stride + k, args.dtype);
    const float row_scale = round_row(x, &rounded);
    for (int64_t row = 0; row < weight.out; ++row) {
      int64_t sum = 0, next = weight.offsets[static_cast<size_t>(row)];
      for (int64_t k = 0; k < weight.in; ++k)
        if (weight.kept(row, k)) sum += rounded[static_cast<size_t>(k)] * codes[static_cast<size_t>(next++)];
      const double linear = static_cast<double>(sum) * row_scale * args.scales[row];
      const double want = linear + (args.bias ? decode(args.bias, row, args.bias_dtype) : 0);
      group.near("y", m * weight.out + row, decode(args.y, m * weight.out + row, args.dtype), want,
                 6 * 0x1p-24 * (std::fabs(linear) + std::fabs(want)) + epsilon_of(args.dtype) * std::fabs(want) +
                     2 * tiny_of(args.dtype));
    }
  }
}

void codes_case(Group& group, Random& random, const Weight& weight, int64_t rows, int64_t tile, int dtype) {
  pykd::Sparse8bitArgs args{};
  args.threads = static_cast<int>(1 + random.below(2));
  args.x_stride = weight.in + random.below(3);
  args.dtype = dtype;
  args.bias_dtype = static_cast<int>(random.below(3));
  std::vector<int8_t> codes;
  const bool extreme = random.chance(0.3);
  for (int64_t i = 0; i < weight.nnz(); ++i)
    codes.push_back(static_cast<int8_t>(extreme ? random.pick<int>({-128, 127}) : 1 + random.below(127)));
  const int64_t bytes =
      pykd::sparse_panels_bytes(weight.bits.data(), weight.in, weight.out, tile, pykd::codes_packing());
  const int64_t floats = pykd::sparse_8bit_scratch(rows, weight.in, tile, args.threads);
  Buffer x(static_cast<size_t>((rows - 1) * args.x_stride + weight.in) * size_of(dtype));
  Buffer pack(static_cast<size_t>(bytes)), scales(static_cast<size_t>(weight.out) * 4);
  Buffer bias(static_cast<size_t>(weight.out) * size_of(args.bias_dtype));
  Buffer y(static_cast<size_t>(rows * weight.out) * size_of(dtype)), scratch(static_cast<size_t>(floats) * 4);
  Buffer dense(static_cast<size_t>(weight.out * weight.in));
  std::memset(scratch.data(), 0xff, static_cast<size_t>(floats) * 4);
  for (int64_t m = 0; m < rows; ++m) {
    const double spread = random.pick<double>({1, 1, 30, 1e-3, 0});
    for (int64_t k = 0; k < weight.in; ++k) encode(x.data(), m * args.x_stride + k, dtype, spread * random.normal());
    if (random.chance(0.1))
      encode(x.data(), m * args.x_stride + random.below(weight.in), dtype,
             random.pick<double>({HUGE_VAL, std::nan("")}));
  }
  for (int64_t i = 0; i < weight.out; ++i) {
    encode(bias.data(), i, args.bias_dtype, random.normal());
    scales.as<float>()[i] = static_cast<float>(random.normal() * 0.01);
  }
  pykd::sparse_panels_pack(weight.bits.data(), codes.data(), weight.offsets.data(), weight.in, weight.out, tile,
                           pykd::codes_packing(), pack.as<uint8_t>());
  pykd::sparse_codes_unpack(pack.as<uint8_t>(), dense.as<int8_t>());
  size_t next = 0;
  for (int64_t i = 0; i < weight.out * weight.in; ++i) {
    const int8_t want = weight.kept(i / weight.in, i % weight.in) ? codes[next++] : int8_t{0};
    group.require(dense.as<int8_t>()[i] == want, "another code came back");
  }
  args.x = x.data();
  args.pack = pack.as<uint8_t>();
  args.scales = scales.as<float>();
  args.bias = random.chance(0.5) ? bias.data() : nullptr;
  args.y = y.data();
  args.scratch = scratch.as<float>();
  args.rows = rows;
  args.in_features = weight.in;
  args.out_features = weight.out;
  pykd::table().sparse_8bit(args);
  compare_codes(group, weight, codes, args);
  group.intact({&x, &pack, &scales, &bias, &y, &scratch, &dense});
}

void codes(const std::string& level) {
  Random random(9);
  for (int dtype = 0; dtype < 3; ++dtype) {
    Group group(level + " sparse_8bit " + name_of(dtype));
    for (const int64_t rows : {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 250}) {
      const int64_t out = random.pick<int64_t>({1, 5, 16, 127, 128, 150}),
                    in = random.pick<int64_t>({1, 9, 16, 127, 129, 300, 1100}),
                    tile = random.pick<int64_t>({8, 128, 255});
      const double density = random.pick<double>({0.0, 0.05, 0.2, 0.6});
      group.begin("%lld rows, %lld outputs, %lld inputs, density %g, tiles of %lld", static_cast<long long>(rows),
                  static_cast<long long>(out), static_cast<long long>(in), density, static_cast<long long>(tile));
      codes_case(group, random, Weight(random, out, in, density, pykd::kFloat32), rows, tile, dtype);
    }
  }
}

void nibbles_case(Group& group, Random& random, const Weight& weight, int64_t group_size, int dtype) {
  pykd::Sparse4bitArgs args{};
  args.in_features = weight.in;
  args.out_features = weight.out;
  args.group_size = group_size;
  args.zero_code = static_cast<int>(random.below(16));
  args.dtype = dtype;
  args.bias_dtype = static_cast<int>(random.below(3));
  args.threads = static_cast<int>(1 + random.below(2));
  const int64_t padded = (weight.in + 31) / 32 * 32, groups = (weight.in + group_size - 1) / group_size;
  std::vector<uint8_t> packed, kept;  // bytes; the code of every kept weight
  std::vector<int64_t> offsets;
  for (int64_t row = 0; row < weight.out; ++row) {
    offsets.push_back(static_cast<int64_t>(packed.size()));
    for (int64_t block = 0; block < padded; block += 32) {
      int entry = 0;
      for (int64_t k = block; k < block + 32 && k < weight.in; ++k) {
        if (!weight.kept(row, k)) continue;
        kept.push_back(static_cast<uint8_t>(random.below(16)));
        if (entry % 2 == 0) packed.push_back(0);
        packed.back() = static_cast<uint8_t>(packed.back() | kept.back() << entry++ % 2 * 4);
      }
    }
  }
  packed.resize(packed.size() + 16, 0xff);
  Buffer x(static_cast<size_t>(padded) * 4), bits(static_cast<size_t>(weight.out * padded / 8)), codes(packed.size());
  Buffer starts(offsets.size() * 8), scales(static_cast<size_t>(weight.out * groups) * 2), table(64);
  Buffer bias(static_cast<size_t>(weight.out) * size_of(args.bias_dtype));
  Buffer y(static_cast<size_t>(weight.out) * size_of(dtype));
  for (int64_t row = 0; row < weight.out; ++row)
    for (int64_t byte = 0; byte < padded / 8; ++byte)
      bits.as<uint8_t>()[row * padded / 8 + byte] =
          byte < weight.row_bytes ? weight.bits[static_cast<size_t>(row * weight.row_bytes + byte)] : uint8_t{0};
  for (int64_t k = 0; k < padded; ++k) x.as<float>()[k] = k < weight.in ? static_cast<float>(random.normal()) : 0.0f;
  for (int i = 0; i < 16; ++i) table.as<float>()[i] = i == args.zero_code ? 0.0f : static_cast<float>(random.normal());
  for (int64_t i = 0; i < weight.out * groups; ++i) encode(scales.data(), i, pykd::kFloat16, random.normal());
  for (int64_t i = 0; i < weight.out; ++i) encode(bias.data(), i, args.bias_dtype, random.normal());
  args.x = x.as<float>();
  args.bitmask = bits.as<uint8_t>();
  args.codes = put(codes, packed);
  args.offsets = put(starts, offsets);
  args.scales = scales.data();
  args.table = table.as<float>();
  args.bias = random.chance(0.5) ? bias.data() : nullptr;
  args.y = y.data();
  pykd::table().sparse_4bit(args);
  size_t next = 0;
  for (int64_t row = 0; row < weight.out; ++row) {
    double want = args.bias ? decode(args.bias, row, args.bias_dtype) : 0, size = std::fabs(want);
    for (int64_t k = 0; k < weight.in; ++k) {
      if (!weight.kept(row, k)) continue;
      const double scale = decode(scales.data(), row * groups + k / group_size, pykd::kFloat16);
      const double term = args.table[kept[next++]] * scale * args.x[k];
      want += term;
      size += std::fabs(term);
    }
    group.near("y", row, decode(y.data(), row, dtype), want,
               2e-6 * size + epsilon_of(dtype) * std::fabs(want) + 2 * tiny_of(dtype));
  }
  group.intact({&x, &bits, &codes, &starts, &scales, &table, &bias, &y});
}

void nibbles(const std::string& level) {
  Random random(10);
  for (int dtype = 0; dtype < 3; ++dtype) {
    Group group(level + " sparse_4bit " + name_of(dtype));
    for (const int64_t in : {1, 31, 32, 33, 64, 100, 544, 1100}) {
      const int64_t out = random.pick<int64_t>({1, 5, 31, 32, 33, 70}), size = random.pick<int64_t>({32, 64, 160});
      const double density = random.pick<double>({0.0, 0.1, 0.5, 1.0});
      group.begin("%lld outputs, %lld inputs, groups of %lld, density %g", static_cast<long long>(out),
                  static_cast<long long>(in), static_cast<long long>(size), density);
      nibbles_case(group, random, Weight(random, out, in, density, pykd::kFloat32), size, dtype);
    }
  }
}

void bitmask(const std::string& level) {
  Random random(7);
  Group group(level + " bitmask_expand, bitmask_gather");
  for (const int dtype : {pykd::kFloat32, pykd::kFloat16})
    for (const int64_t in : {1, 8, 9, 63, 130}) {
      group.begin("%lld inputs of %s", static_cast<long long>(in), name_of(dtype));
      const Weight weight(random, 5, in, 0.4, dtype);
      const size_t size = size_of(dtype), kept = static_cast<size_t>(weight.nnz());
      Buffer bits(weight.bits.size()), offsets(weight.offsets.size() * 8), values(kept * size), back(kept * size);
      Buffer dense(weight.dense.size() * size);
      for (int64_t i = 0; i < weight.nnz(); ++i) encode(values.data(), i, dtype, weight.values[static_cast<size_t>(i)]);
      pykd::BitmaskArgs args{put(bits, weight.bits),
                             put(offsets, weight.offsets),
                             values.data(),
                             dense.data(),
                             in,
                             5,
                             static_cast<int>(size),
                             2};
      pykd::table().bitmask_expand(args);
      for (size_t i = 0; i < weight.dense.size(); ++i)
        group.near("dense", static_cast<int64_t>(i), decode(dense.data(), static_cast<int64_t>(i), dtype),
                   weight.dense[i], 0);
      args.values = back.data();
      pykd::table().bitmask_gather(args);
      group.require(kept == 0 || std::memcmp(back.data(), values.data(), kept * size) == 0,
                    "other values were gathered");
      group.intact({&bits, &offsets, &values, &back, &dense});
    }
}

}  // namespace

void sparse(const std::string& level) {
  linear(level);
  panels(level);
  codes(level);
  nibbles(level);
  bitmask(level);
}

}  // namespace check
