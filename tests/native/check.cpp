#include "check.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace check {
namespace {

constexpr uint8_t kPattern = 0xa5;

Edge current_edge = Edge::kEnd;
int total_passed = 0, total_failed = 0;
char current_case[512];

void on_segfault(int) {
  const char text[] = ": memory outside of a buffer was touched\n";
  ssize_t written = write(STDOUT_FILENO, current_case, strlen(current_case));
  written += write(STDOUT_FILENO, text, sizeof text - 1);
  _exit(written > 0 ? 3 : 4);
}

size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

struct Format {
  int mantissa, bias;
};
Format format_of(int dtype) { return dtype == pykd::kBFloat16 ? Format{7, 127} : Format{10, 15}; }

}  // namespace

void set_edge(Edge edge) { current_edge = edge; }

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  const size_t page = page_size();
  room_ = (bytes + page - 1) / page * page;
  if (room_ == 0) room_ = page;
  void* memory = mmap(nullptr, room_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  pages_ = static_cast<uint8_t*>(memory) + page;
  if (memory == MAP_FAILED || mprotect(pages_, room_, PROT_READ | PROT_WRITE) != 0) {
    perror("mmap of a guarded buffer");
    abort();
  }
  memset(pages_, kPattern, room_);
  data_ = current_edge == Edge::kEnd ? pages_ + room_ - bytes : pages_;
}

Buffer::~Buffer() { munmap(pages_ - page_size(), room_ + 2 * page_size()); }

bool Buffer::intact() const {
  for (uint8_t* p = pages_; p < data_; ++p)
    if (*p != kPattern) return false;
  for (uint8_t* p = data_ + bytes_; p < pages_ + room_; ++p)
    if (*p != kPattern) return false;
  return true;
}

uint64_t Random::next() {
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

double Random::uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

double Random::normal() {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += uniform();
  return sum;
}

size_t size_of(int dtype) { return dtype == pykd::kFloat32 ? 4 : 2; }

const char* name_of(int dtype) {
  return dtype == pykd::kFloat32 ? "float32" : dtype == pykd::kBFloat16 ? "bfloat16" : "float16";
}

double epsilon_of(int dtype) { return dtype == pykd::kFloat32 ? 0x1p-24 : std::ldexp(0.5, -format_of(dtype).mantissa); }

double tiny_of(int dtype) {
  if (dtype == pykd::kFloat32) return 0x1p-150;
  return std::ldexp(0.5, 1 - format_of(dtype).bias - format_of(dtype).mantissa);
}

double decode_half(int dtype, uint16_t bits) {
  const Format f = format_of(dtype);
  const int top = (1 << (15 - f.mantissa)) - 1, exponent = bits >> f.mantissa & top;
  const int fraction = bits & ((1 << f.mantissa) - 1);
  double value = 0;
  if (exponent == top)
    value = fraction != 0 ? std::nan("") : HUGE_VAL;
  else if (exponent == 0)
    value = std::ldexp(fraction, 1 - f.bias - f.mantissa);
  else
    value = std::ldexp(fraction + (1 << f.mantissa), exponent - f.bias - f.mantissa);
  return bits & 0x8000 ? -value : value;
}

uint16_t encode_half(int dtype, double value) {
  const Format f = format_of(dtype);
  const int sign = std::signbit(value) ? 0x8000 : 0, infinity = ((1 << (15 - f.mantissa)) - 1) << f.mantissa;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | infinity | 1 << (f.mantissa - 1));
  if (magnitude == 0) return static_cast<uint16_t>(sign);
  if (std::isinf(value)) return static_cast<uint16_t>(sign | infinity);
  const int exponent = std::max(std::ilogb(magnitude), 1 - f.bias);
  // In units of the last place; a normal number's hidden bit, or a carry out of rounding, adds one to the exponent.
  const double units = std::nearbyint(std::ldexp(magnitude, f.mantissa - exponent));
  const int64_t bits = (static_cast<int64_t>(exponent + f.bias - 1) << f.mantissa) + static_cast<int64_t>(units);
  return static_cast<uint16_t>(sign | (bits < infinity ? bits : infinity));
}

double decode(const void* data, int64_t index, int dtype) {
  if (dtype == pykd::kFloat32) return static_cast<const float*>(data)[index];
  return decode_half(dtype, static_cast<const uint16_t*>(data)[index]);
}

void encode(void* data, int64_t index, int dtype, double value) {
  if (dtype == pykd::kFloat32)
    static_cast<float*>(data)[index] = static_cast<float>(value);
  else
    static_cast<uint16_t*>(data)[index] = encode_half(dtype, value);
}

Group::Group(std::string name) : name_(std::move(name)) {}

Group::~Group() {
  end();
  printf("%-44s %5d cases, %d failed, largest error %.2f of the allowed\n", name_.c_str(), cases_, failed_, worst_);
  fflush(stdout);
}

void Group::begin(const char* format, ...) {
  end();
  open_ = true;
  bad_ = false;
  ++cases_;
  const int used = snprintf(current_case, sizeof current_case, "%s: ", name_.c_str());
  va_list values;
  va_start(values, format);
  vsnprintf(current_case + used, sizeof current_case - static_cast<size_t>(used), format, values);
  va_end(values);
}

void Group::end() {
  if (!open_) return;
  open_ = false;
  failed_ += bad_;
  total_failed += bad_;
  total_passed += !bad_;
}

void Group::fail(const std::string& detail) {
  bad_ = true;
  if (shown_++ < 5) printf("FAILED %s: %s\n", current_case, detail.c_str());
}

void Group::require(bool ok, const char* what) {
  if (!ok) fail(what);
}

void Group::near(const char* what, int64_t index, double got, double want, double tolerance) {
  const double error = std::fabs(got - want);
  if (got == want || (std::isnan(got) && std::isnan(want))) return;
  if (std::isfinite(error) && tolerance > 0) worst_ = std::max(worst_, error / tolerance);
  if (error <= tolerance && std::isfinite(want)) return;
  char text[200];
  snprintf(text, sizeof text, "%s[%lld] is %.9g, expected %.9g within %.3g", what, static_cast<long long>(index), got,
           want, tolerance);
  fail(text);
}

void Group::intact(const std::vector<const Buffer*>& buffers) {
  for (const Buffer* buffer : buffers) require(buffer->intact(), "the memory around a buffer was changed");
}

void report_segfaults() {
  struct sigaction action = {};
  action.sa_handler = on_segfault;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

int passed() { return total_passed; }
int failed() { return total_failed; }

float round_row(const std::vector<double>& x, std::vector<int>* codes) {
  float largest = 0;
  bool finite = true;
  for (const double v : x) {
    finite = finite && std::isfinite(v);
    largest = std::max(largest, static_cast<float>(std::fabs(v)));
  }
  const float scale = largest / 127.0f, divisor = scale > 0 ? scale : 1.0f;
  codes->clear();
  for (const double v : x) {
    const float code = finite ? std::nearbyint(static_cast<float>(v) / divisor) : 0.0f;
    codes->push_back(static_cast<int>(std::max(-127.0f, std::min(127.0f, code))));
  }
  return finite ? scale : std::nanf("");
}

}  // namespace check
