// The vector verbs: conversions over every 16-bit pattern, exp and log against double precision, arithmetic, tails.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "check.h"
#include "verbs.h"

namespace check {
namespace {

using pykd::Binary;
using pykd::Unary;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

pykd::Verbs verbs_of([[maybe_unused]] const std::string& level) {
#ifdef PYKD_X86
  if (level == "avx2") return pykd::avx2::verbs();
  if (level == "avx512") return pykd::avx512::verbs();
  if (level == "avx512_bf16") return pykd::avx512_bf16::verbs();
#endif
  return pykd::scalar::verbs();
}

// Distance between neighbouring floats at |x|.
double ulp(double x) {
  const bool number = std::isfinite(x) && x != 0;
  return std::ldexp(1.0, number ? std::max(std::ilogb(x) - 23, -149) : -149);
}

float* put(const Buffer& buffer, const std::vector<float>& values) {
  if (!values.empty()) std::memcpy(buffer.data(), values.data(), values.size() * sizeof(float));
  return buffer.as<float>();
}

// Bochs 2.7 rounds float16 halves up (at its avx2 level too, which is right on real CPUs): run_avx512.sh says so.
bool half_up(int dtype, float x) {
  static const bool bochs = std::getenv("PYKD_BOCHS") != nullptr;
  const auto beside = [&](float to) { return encode_half(dtype, std::nextafterf(x, to)); };
  return bochs && dtype == pykd::kFloat16 && beside(-kInfinity) != beside(kInfinity);
}

void conversions(const pykd::Verbs& v, const std::string& level) {
  for (const int dtype : {pykd::kBFloat16, pykd::kFloat16}) {
    Group group(level + " " + name_of(dtype) + " to and from float32");
    Buffer half(65536 * 2), full(65536 * 4);
    uint16_t* bits = half.as<uint16_t>();
    for (int i = 0; i < 65536; ++i) bits[i] = static_cast<uint16_t>(i);
    group.begin("every pattern to float32");
    v.widen(dtype, bits, 65536, full.as<float>());
    for (int i = 0; i < 65536; ++i) group.near("float", i, full.as<float>()[i], decode_half(dtype, bits[i]), 0);
    group.require(std::signbit(full.as<float>()[0x8000]), "-0 lost its sign");

    for (int shift = -2; shift <= 2; ++shift) {  // each value, halfway to the next, and the floats beside that
      group.begin("from float32 at step %d", shift);
      for (int i = 0; i < 65536; ++i) {
        const uint16_t from = static_cast<uint16_t>(i);
        const double here = decode_half(dtype, from), next = decode_half(dtype, static_cast<uint16_t>(i + 1));
        float x = static_cast<float>(shift == -2 || !std::isfinite(next) ? here : (here + next) / 2);
        if (shift == -1) x = std::nextafterf(x, -kInfinity);
        if (shift == 1) x = std::nextafterf(x, kInfinity);
        if (shift == 2) x = static_cast<float>(here * 1e4);
        full.as<float>()[i] = x;
      }
      v.narrow(dtype, full.as<float>(), 65536, bits);
      for (int i = 0; i < 65536; ++i) {
        const float x = full.as<float>()[i];
        if (std::isnan(x))
          group.require(std::isnan(decode_half(dtype, bits[i])), "NaN became a number");
        else
          group.near("bits", i, bits[i], encode_half(dtype, x), half_up(dtype, x) ? 1 : 0);
      }
    }
    group.intact({&half, &full});
  }
}

template <class Verb, class Truth>
void unary(Group& group, const char* name, const std::vector<float>& x, double ulps, const Verb& verb,
           const Truth& truth) {
  group.begin("%s", name);
  Buffer from(x.size() * 4), to(x.size() * 4);
  const int64_t count = static_cast<int64_t>(x.size());
  verb(put(from, x), count, to.as<float>());
  for (int64_t i = 0; i < count; ++i) {
    const double want = truth(static_cast<double>(x[static_cast<size_t>(i)]));
    group.near(name, i, to.as<float>()[i], want, ulps * ulp(want));
  }
  group.intact({&from, &to});
}

void logarithms(Group& group, const pykd::Verbs& v, const std::vector<float>& x, const std::vector<float>& y) {
  group.begin("log_quotient");
  Buffer above(x.size() * 4), below(y.size() * 4), to(x.size() * 4);
  v.binary(Binary::kLogQuotient, put(above, x), put(below, y), static_cast<int64_t>(x.size()), to.as<float>());
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = std::log(static_cast<double>(x[i]) / y[i]);
    group.near("log", static_cast<int64_t>(i), to.as<float>()[i], want, 3 * ulp(want));
  }
  group.intact({&above, &below, &to});
}

void activations(const pykd::Verbs& v, const std::string& level) {
  Group group(level + " gelu, gelu_tanh, silu, relu");
  Random random(2);
  std::vector<float> x = {0.0f, kInfinity, -kInfinity, kNan, 1e30f, -1e30f, 1e-30f, -1e-30f, -20.0f, 20.0f, 3e-45f};
  for (int i = 0; i < 9000; ++i) x.push_back(static_cast<float>(random.uniform() * 27 - 13.5));
  unary(
      group, "gelu", x, 8.0, [&](const float* a, int64_t n, float* y) { v.unary(Unary::kGelu, a, n, y); },
      [](double a) { return a * 0.5 * std::erfc(-a * std::sqrt(0.5)); });
  unary(
      group, "silu", x, 4.0, [&](const float* a, int64_t n, float* y) { v.unary(Unary::kSilu, a, n, y); },
      [](double a) { return a / (1 + std::exp(-a)); });
  unary(
      group, "relu", x, 0.0, [&](const float* a, int64_t n, float* y) { v.unary(Unary::kRelu, a, n, y); },
      [](double a) { return a < 0 ? 0.0 : a; });
  x = {0.0f, kInfinity, kNan, 1e30f, 1e-30f};
  for (int i = 0; i < 9000; ++i) x.push_back(static_cast<float>(random.uniform() * 25 - 5));
  unary(  // the exponential magnifies the rounding of its argument, which is -17 at x = -5
      group, "gelu_tanh", x, 40.0, [&](const float* a, int64_t n, float* y) { v.unary(Unary::kGeluTanh, a, n, y); },
      [](double a) { return a / (1 + std::exp(-2 * std::sqrt(2 / std::acos(-1.0)) * (a + 0.044715 * a * a * a))); });
}

void functions(const pykd::Verbs& v, const std::string& level) {
  Group group(level + " exp, log, round_even, reductions");
  Random random(1);
  std::vector<float> x = {0.0f, -0.0f, -kInfinity, kNan, -104.5f, -1e30f, -103.9f, -87.4f, 88.6f, 1e-30f};
  for (int i = 0; i < 9000; ++i) x.push_back(static_cast<float>(random.uniform() * 192 - 103.9));
  unary(
      group, "exp", x, 2.0, [&](const float* a, int64_t n, float* y) { v.unary(Unary::kExp, a, n, y); },
      [](double a) { return a < -104 ? 0.0 : std::exp(a); });
  for (const double scale : {1.0, 0.25, 1.0 / 3, 7.0, 1e-3}) {
    x = {0.0f, -kInfinity, kNan, -1e30f};
    for (int i = 0; i < 3000; ++i) x.push_back(static_cast<float>(-random.uniform() * 87.3 / scale));
    // Without a fused multiply-add (scalar) the reduced argument has the rounding error of x * scale, at most 87.3.
    unary(
        group, "scaled exp", x, v.width == 1 ? 90.0 : 2.0,
        [&](const float* a, int64_t n, float* y) { v.scaled_exp(scale, a, n, y); },
        [&](double a) { return std::exp(a * scale) < 0x1p-126 ? 0.0 : std::exp(a * scale); });
  }
  std::vector<float> y;
  x = {1.0f, 0x1p-126f, 3e38f, 0x1p-100f, 0.99999994f, 1.0000001f, 1.5f, 1.0f, 1.4999999f, 0.5f, 0x1.fffffep-1f};
  y = {1.0f, 8e37f, 0x1p-100f, 0x1p-100f, 1.0f, 1.0f, 1.0f, 1.5f, 1.0f, 0.75f, 1.0f};
  for (int i = 0; i < 6000; ++i) {
    x.push_back(static_cast<float>(std::exp(random.uniform() * 175 - 87)));
    const double factor = i % 2 ? 1 + (random.uniform() - 0.5) * 1e-4 : std::exp(random.uniform() * 20 - 10);
    y.push_back(static_cast<float>(std::min(std::max(x.back() * factor, 0x1p-100), 8e37)));
  }
  logarithms(group, v, x, y);
  x = {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 0.49999997f, 1e6f, -3.7f};
  unary(
      group, "round_even", x, 0, [&](const float* a, int64_t n, float* y) { v.unary(Unary::kRoundEven, a, n, y); },
      [](double a) { return std::nearbyint(a); });

  group.begin("reductions");
  for (int lane = 0; lane < v.width; ++lane) {
    std::vector<float> lanes(static_cast<size_t>(v.width), -3.0f);
    lanes[static_cast<size_t>(lane)] = 5.0f;
    Buffer from(lanes.size() * 4);
    put(from, lanes);
    group.near("max", lane, v.reduce_max(from.as<float>()), 5, 0);
    group.near("sum", lane, v.reduce_add(from.as<float>()), 5 - 3 * (v.width - 1), 0);
  }
  group.begin("transpose");
  if (v.width > 1) {
    const int64_t width = v.width;
    Buffer from(static_cast<size_t>(width * width) * 4), to(static_cast<size_t>(width * width) * 4);
    for (int64_t i = 0; i < width * width; ++i) from.as<float>()[i] = static_cast<float>(i);
    v.transpose(from.as<float>(), to.as<float>());
    for (int64_t i = 0; i < width * width; ++i)
      group.near("element", i, to.as<float>()[i], static_cast<double>(i % width * width + i / width), 0);
  }
}

double truth(Binary verb, double a, double b) {
  switch (verb) {
    case Binary::kAdd:
      return a + b;
    case Binary::kSub:
      return a - b;
    case Binary::kMul:
      return a * b;
    case Binary::kDiv:
      return a / b;
    case Binary::kFma:
      return a * b + a;
    case Binary::kFnma:
      return a - a * b;
    case Binary::kMin:
      return a < b ? a : b;
    case Binary::kMax:
      return a > b ? a : b;
    case Binary::kSelectLess:
      return a < b ? a : 7;
    case Binary::kSelectEqual:
      return a == b ? a : 7;
    case Binary::kScaleByPower:
      return std::ldexp(a, static_cast<int>(b));
    case Binary::kLogQuotient:
      break;  // for positive numbers: see logarithms
  }
  return kNan;
}

void arithmetic(const pykd::Verbs& v, const std::string& level) {
  Group group(level + " arithmetic, comparisons, tails");
  Random random(2);
  for (int verb = 0; verb <= static_cast<int>(Binary::kScaleByPower); ++verb) {
    const bool power = verb == static_cast<int>(Binary::kScaleByPower);
    for (const int64_t count : {1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 500}) {
      group.begin("verb %d of %lld elements", verb, static_cast<long long>(count));
      const size_t bytes = static_cast<size_t>(count) * 4;
      Buffer a(bytes), b(bytes), y(bytes);
      for (int64_t i = 0; i < count; ++i) {
        a.as<float>()[i] = static_cast<float>(random.normal());
        b.as<float>()[i] = power ? static_cast<float>(random.below(256) - 127) : static_cast<float>(random.normal());
        if (!power && random.chance(0.2)) b.as<float>()[i] = a.as<float>()[i];
        if (!power && random.chance(0.1)) (random.chance(0.5) ? a : b).as<float>()[i] = kNan;
      }
      v.binary(static_cast<Binary>(verb), a.as<float>(), b.as<float>(), count, y.as<float>());
      for (int64_t i = 0; i < count; ++i) {
        const double x = a.as<float>()[i], z = b.as<float>()[i], want = truth(static_cast<Binary>(verb), x, z);
        const double size = std::fabs(want) + (verb == 4 || verb == 5 ? std::fabs(x) + std::fabs(x * z) : 0);
        const bool exact = static_cast<double>(static_cast<float>(want)) == want;
        group.near("y", i, y.as<float>()[i], want, exact ? 0 : size * 0x1p-23 + 0x1p-149);
      }
      group.intact({&a, &b, &y});
    }
  }
}

}  // namespace

void verbs(const std::string& level) {
  const pykd::Verbs v = verbs_of(level);
  conversions(v, level);
  functions(v, level);
  activations(v, level);
  arithmetic(v, level);
}

}  // namespace check
