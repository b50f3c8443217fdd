// A post-norm transformer encoder layer whose linear layers are w8a8, in one call:
//   z = norm(x + mix(attention(query(x), key(x), value(x)))),  y = norm(z + down(activation(up(z))))
// Each step is an op of its own and computes what it would alone, to the bit. A layer of a short text takes some
// hundred microseconds, of which ten calls from Python, each waiting for the interpreter's lock, would be a good part.
#include "ops.h"

namespace pykd::PYKD_LEVEL {
namespace {

void multiply(const Packed8bit& layer, const float* x, float* y, float* scratch, int64_t rows, int threads,
              bool rounded = false) {
  Linear8bitArgs args{};
  args.x = x;
  args.x_stride = layer.in_features;
  args.packed = layer.packed;
  args.bias = layer.bias;
  args.y = y;
  args.scratch = scratch;
  args.rows = rows;
  args.in_features = layer.in_features;
  args.out_features = layer.out_features;
  args.rounds = 1;
  args.activation = layer.activation;
  args.dtype = kFloat32;
  args.bias_dtype = layer.bias_dtype;
  args.threads = threads;
  args.input_scale = layer.input_scale;
  args.input_zero = layer.input_zero;
  args.rounded = rounded;
  linear_8bit(args);
}

// Whether two layers with the same rows of x make the same codes of it, all of which are in the scratch at once.
bool round_alike(const Packed8bit& a, const Packed8bit& b, int64_t rows) {
  return rows <= kLinear8bitRows && a.input_scale == b.input_scale && a.input_zero == b.input_zero;
}

}  // namespace

void encoder_layer_8bit(const EncoderLayer8bitArgs& a) {
  const int64_t rows = a.batch * a.length, width = a.heads * a.dim;
  // Queries, keys, values and what attention makes of them are gone when the neurons need their memory.
  float *first = a.scratch, *sum = first + rows * (4 * width > a.neurons ? 4 * width : a.neurons),
        *z = sum + rows * a.hidden;
  float* rest = z + rows * a.hidden;
  float *q = first, *k = q + rows * width, *v = k + rows * width, *mixed = v + rows * width;
  multiply(a.query, a.x, q, rest, rows, a.threads);
  multiply(a.key, a.x, k, rest, rows, a.threads, round_alike(a.query, a.key, rows));
  multiply(a.value, a.x, v, rest, rows, a.threads, round_alike(a.key, a.value, rows));
  attention({q, k, v, width, width, width, a.bias, mixed, rest, a.batch, a.length, a.heads, a.dim, a.scale, a.threads});
  multiply(a.mix, mixed, sum, rest, rows, a.threads);
  add_norm({sum, a.x, a.norm_weight[0], a.norm_bias[0], z, rows, a.hidden, a.eps[0], a.threads});
  multiply(a.up, z, first, rest, rows, a.threads);
  multiply(a.down, first, sum, rest, rows, a.threads);
  add_norm({sum, z, a.norm_weight[1], a.norm_bias[1], a.y, rows, a.hidden, a.eps[1], a.threads});
}

}  // namespace pykd::PYKD_LEVEL
