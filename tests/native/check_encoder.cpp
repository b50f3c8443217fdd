// attention and add_norm against plain double-precision loops; encoder_layer_8bit against its ops one after the other.
#include <cmath>
#include <cstring>

#include "check.h"

namespace check {
namespace {

void fill(const Buffer& buffer, int64_t count, Random& random, double spread = 1) {
  for (int64_t i = 0; i < count; ++i) buffer.as<float>()[i] = static_cast<float>(spread * random.normal());
}

size_t floats(int64_t count) { return static_cast<size_t>(count) * 4; }

// --- attention ------------------------------------------------------------------------------------------------------

void compare(Group& group, const pykd::AttentionArgs& a) {
  const int64_t width = a.heads * a.dim;
  std::vector<double> weights(static_cast<size_t>(a.length));
  for (int64_t row = 0; row < a.batch * a.length; ++row)
    for (int64_t head = 0; head < a.heads; ++head) {
      const int64_t first = row / a.length * a.length;
      double most = -HUGE_VAL, sum = 0;
      for (int64_t key = 0; key < a.length; ++key) {
        double score = 0;
        for (int64_t d = 0; d < a.dim; ++d)
          score += static_cast<double>(a.q[row * a.q_stride + head * a.dim + d]) *
                   a.k[(first + key) * a.k_stride + head * a.dim + d];
        score = score * a.scale + (a.bias ? a.bias[first + key] : 0.0f);
        weights[static_cast<size_t>(key)] = score;
        most = std::fmax(most, score);
      }
      for (double& weight : weights) sum += weight = most > -HUGE_VAL ? std::exp(weight - most) : 0.0;
      for (int64_t d = 0; d < a.dim; ++d) {
        double want = 0, size = 0;
        for (int64_t key = 0; key < a.length; ++key) {
          const double term = weights[static_cast<size_t>(key)] * a.v[(first + key) * a.v_stride + head * a.dim + d] /
                              (sum > 0 ? sum : 1);
          want += term;
          size += std::fabs(term);
        }
        const int64_t at = row * width + head * a.dim + d;
        group.near("y", at, a.y[at], want, 1e-5 * size + 1e-30);
      }
    }
}

void run_attention(Group& group, Random& random, pykd::AttentionArgs a, bool masked) {
  const int64_t rows = a.batch * a.length, width = a.heads * a.dim;
  a.q_stride = width + random.below(3), a.k_stride = width + random.below(3), a.v_stride = width + random.below(3);
  const Buffer q(floats((rows - 1) * a.q_stride + width)), k(floats((rows - 1) * a.k_stride + width));
  const Buffer v(floats((rows - 1) * a.v_stride + width)), bias(floats(rows)), y(floats(rows * width));
  const Buffer scratch(floats(a.threads * pykd::attention_scratch(a.length, a.dim)));
  fill(q, (rows - 1) * a.q_stride + width, random, 2);
  fill(k, (rows - 1) * a.k_stride + width, random);
  fill(v, (rows - 1) * a.v_stride + width, random);
  for (int64_t i = 0; i < rows; ++i) bias.as<float>()[i] = random.chance(0.3) ? -INFINITY : 0.0f;
  a.q = q.as<float>(), a.k = k.as<float>(), a.v = v.as<float>(), a.y = y.as<float>(), a.scratch = scratch.as<float>();
  a.bias = masked ? bias.as<float>() : nullptr;
  pykd::table().attention(a);
  compare(group, a);
  group.intact({&q, &k, &v, &bias, &y, &scratch});
}

// --- add_norm -------------------------------------------------------------------------------------------------------

void run_add_norm(Group& group, Random& random, int64_t rows, int64_t size, int threads) {
  const Buffer x(floats(rows * size)), residual(floats(rows * size)), y(floats(rows * size));
  const Buffer weight(floats(size)), bias(floats(size));
  fill(x, rows * size, random, 3);
  fill(residual, rows * size, random);
  fill(weight, size, random);
  fill(bias, size, random);
  const float eps = 1e-5f;
  pykd::table().add_norm({x.as<float>(), residual.as<float>(), weight.as<float>(), bias.as<float>(), y.as<float>(),
                          rows, size, eps, threads});
  for (int64_t row = 0; row < rows; ++row) {
    const auto sum = [&](int64_t k) {
      return static_cast<double>(x.as<float>()[row * size + k]) + residual.as<float>()[row * size + k];
    };
    double mean = 0, variance = 0;
    for (int64_t k = 0; k < size; ++k) mean += sum(k) / static_cast<double>(size);
    for (int64_t k = 0; k < size; ++k) variance += (sum(k) - mean) * (sum(k) - mean) / static_cast<double>(size);
    for (int64_t k = 0; k < size; ++k) {
      const double scaled = (sum(k) - mean) / std::sqrt(variance + eps) * weight.as<float>()[k];
      group.near("y", row * size + k, y.as<float>()[row * size + k], scaled + bias.as<float>()[k],
                 2e-5 * (std::fabs(weight.as<float>()[k]) + std::fabs(scaled)) + 1e-6);
    }
  }
  group.intact({&x, &residual, &weight, &bias, &y});
}

// --- encoder_layer_8bit ---------------------------------------------------------------------------------------------

// A weight whose bytes are any: 32 outputs a strip have scales and starting sums in front, which are set to what fits.
struct Weight {
  pykd::Packed8bit layer{};
  Buffer packed, bias;

  Weight(Random& random, int64_t out, int64_t in, int activation)
      : packed(static_cast<size_t>((out + 31) / 32 * (256 + (in + 3) / 4 * 4 * 32))), bias(floats(out)) {
    const int64_t padded = (in + 3) / 4 * 4;
    for (int64_t strip = 0; strip < (out + 31) / 32; ++strip) {
      uint8_t* to = packed.as<uint8_t>() + strip * (256 + padded * 32);
      std::memset(to, 0, static_cast<size_t>(256 + padded * 32));
      for (int64_t lane = 0; lane < 32; ++lane) {
        const float scale = static_cast<float>(0.01 + 0.01 * random.uniform());
        uint32_t start = 0;
        for (int64_t k = 0; k < in; ++k) {
          const int code = static_cast<int>(random.below(255)) - 127;
          to[256 + k / 4 * 128 + 4 * lane + k % 4] = static_cast<uint8_t>(code);
          start -= 128u * static_cast<uint32_t>(code);
        }
        std::memcpy(to + 4 * lane, &scale, 4);
        std::memcpy(to + 128 + 4 * lane, &start, 4);
      }
    }
    fill(bias, out, random);
    layer = {packed.as<uint8_t>(), bias.data(), in, out, pykd::kFloat32, activation, 0.0f, 0};
  }
};

void multiply(const pykd::Packed8bit& layer, const Buffer& x, const Buffer& y, int64_t rows) {
  const Buffer scratch(floats(rows * (1 + (layer.in_features + 3) / 4)));
  pykd::Linear8bitArgs args{};
  args.x = x.data();
  args.x_stride = layer.in_features;
  args.packed = layer.packed;
  args.bias = layer.bias;
  args.y = y.data();
  args.scratch = scratch.as<float>();
  args.rows = rows;
  args.in_features = layer.in_features;
  args.out_features = layer.out_features;
  args.rounds = 1;
  args.activation = layer.activation;
  args.threads = 1;
  pykd::table().linear_8bit(args);
}

void run_layer(Group& group, Random& random, int64_t batch, int64_t length, int64_t hidden, int64_t heads, int64_t dim,
               int64_t neurons, int threads) {
  const int64_t rows = batch * length, width = heads * dim;
  const Weight query(random, width, hidden, 0), key(random, width, hidden, 0), value(random, width, hidden, 0);
  const Weight mix(random, hidden, width, 0), up(random, neurons, hidden, pykd::kGelu),
      down(random, hidden, neurons, 0);
  const Buffer x(floats(rows * hidden)), y(floats(rows * hidden)), want(floats(rows * hidden));
  const Buffer weight(floats(hidden)), bias(floats(hidden)), keys(floats(rows));
  const Buffer scratch(floats(pykd::encoder_layer_8bit_scratch(batch, length, hidden, heads, dim, neurons, threads)));
  fill(x, rows * hidden, random);
  fill(weight, hidden, random);
  fill(bias, hidden, random);
  for (int64_t i = 0; i < rows; ++i) keys.as<float>()[i] = i % 3 == 2 ? -INFINITY : 0.0f;
  pykd::table().encoder_layer_8bit({x.as<float>(),
                                    keys.as<float>(),
                                    y.as<float>(),
                                    scratch.as<float>(),
                                    query.layer,
                                    key.layer,
                                    value.layer,
                                    mix.layer,
                                    up.layer,
                                    down.layer,
                                    {weight.as<float>(), weight.as<float>()},
                                    {bias.as<float>(), bias.as<float>()},
                                    {1e-5f, 1e-12f},
                                    batch,
                                    length,
                                    hidden,
                                    heads,
                                    dim,
                                    neurons,
                                    0.5f,
                                    threads});
  const Buffer q(floats(rows * width)), k(floats(rows * width)), v(floats(rows * width)), mixed(floats(rows * width));
  const Buffer sum(floats(rows * hidden)), z(floats(rows * hidden)), between(floats(rows * neurons));
  const Buffer looking(floats(pykd::attention_scratch(length, dim)));
  multiply(query.layer, x, q, rows);
  multiply(key.layer, x, k, rows);
  multiply(value.layer, x, v, rows);
  pykd::table().attention({q.as<float>(), k.as<float>(), v.as<float>(), width, width, width, keys.as<float>(),
                           mixed.as<float>(), looking.as<float>(), batch, length, heads, dim, 0.5f, 1});
  multiply(mix.layer, mixed, sum, rows);
  pykd::table().add_norm(
      {sum.as<float>(), x.as<float>(), weight.as<float>(), bias.as<float>(), z.as<float>(), rows, hidden, 1e-5f, 1});
  multiply(up.layer, z, between, rows);
  multiply(down.layer, between, sum, rows);
  pykd::table().add_norm({sum.as<float>(), z.as<float>(), weight.as<float>(), bias.as<float>(), want.as<float>(), rows,
                          hidden, 1e-12f, 1});
  for (int64_t i = 0; i < rows * hidden; ++i) group.near("y", i, y.as<float>()[i], want.as<float>()[i], 0);
  group.intact({&x, &y, &keys, &scratch, &query.packed, &down.packed});
}

}  // namespace

void encoder(const std::string& level) {
  Random random(9);
  struct Shape {
    int64_t batch, length, heads, dim;
  };
  const Shape shapes[] = {{1, 1, 1, 1}, {2, 3, 2, 5}, {1, 17, 3, 16}, {2, 31, 1, 33}, {1, 70, 2, 64}, {3, 6, 1, 7}};
  {
    Group group(level + " attention");
    for (const Shape& shape : shapes)
      for (int masked = 0; masked < 2; ++masked) {
        pykd::AttentionArgs a{};
        a.batch = shape.batch, a.length = shape.length, a.heads = shape.heads, a.dim = shape.dim;
        a.scale = 0.3f;
        a.threads = static_cast<int>(1 + random.below(2));
        group.begin("%lld x %lld tokens, %lld heads of %lld, threads %d", static_cast<long long>(shape.batch),
                    static_cast<long long>(shape.length), static_cast<long long>(shape.heads),
                    static_cast<long long>(shape.dim), a.threads);
        run_attention(group, random, a, masked);
      }
  }
  {
    Group group(level + " add_norm");
    for (const int64_t size : {1, 2, 15, 16, 17, 33, 64, 129, 260})
      for (const int64_t rows : {1, 7}) {
        group.begin("%lld rows of %lld", static_cast<long long>(rows), static_cast<long long>(size));
        run_add_norm(group, random, rows, size, static_cast<int>(1 + random.below(2)));
      }
  }
  Group group(level + " encoder_layer_8bit");
  for (const Shape& shape : shapes)
    for (const int64_t neurons : {3, 90}) {
      group.begin("%lld x %lld tokens, %lld neurons", static_cast<long long>(shape.batch),
                  static_cast<long long>(shape.length), static_cast<long long>(neurons));
      run_layer(group, random, shape.batch, shape.length, 2 + shape.length, shape.heads, shape.dim, neurons,
                static_cast<int>(1 + random.below(2)));
    }
}

}  // namespace check
