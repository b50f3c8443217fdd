// What every part of compare_levels uses: guarded memory, seeded numbers, element types, and the tally.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "ops.h"

namespace check {

// Where a buffer touches the inaccessible memory around it: reads and writes beyond that side end the program.
enum class Edge { kEnd, kBegin };
void set_edge(Edge edge);  // for the buffers made from now on

// Memory between two inaccessible pages. What its whole pages hold besides it is a pattern; `intact` looks at that.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  bool intact() const;
  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }

 private:
  size_t bytes_, room_;
  uint8_t *pages_, *data_;
};

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next();
  double uniform();  // in [0, 1)
  double normal();   // roughly: mean 0, variance 1, within +-6
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  bool chance(double p) { return uniform() < p; }
  template <class T>
  T pick(const std::vector<T>& from) {
    return from[static_cast<size_t>(below(static_cast<int64_t>(from.size())))];
  }

 private:
  uint64_t state_;
};

// Element types by their definition, in double precision: mantissa * 2^exponent, to nearest even, overflow to infinity.
size_t size_of(int dtype);
const char* name_of(int dtype);
double epsilon_of(int dtype);                               // half the distance from 1 to the next number
double tiny_of(int dtype);                                  // half the smallest subnormal
double decode(const void* data, int64_t index, int dtype);  // exact
void encode(void* data, int64_t index, int dtype, double value);
uint16_t encode_half(int dtype, double value);  // of kBFloat16, kFloat16
double decode_half(int dtype, uint16_t bits);

// int8 codes of numbers and their scale, absmax / 127 in float32; NaN where one is NaN or infinity: quantize_rows in
// pykd/ops/linear_8bit.py.
float round_row(const std::vector<double>& x, std::vector<int>* codes);

// One line of the report: cases with a common name, each passed unless one of its checks failed.
class Group {
 public:
  explicit Group(std::string name);
  ~Group();
  void begin(const char* format, ...) __attribute__((format(printf, 2, 3)));
  void require(bool ok, const char* what);
  void near(const char* what, int64_t index, double got, double want, double tolerance);  // NaN wants NaN
  void intact(const std::vector<const Buffer*>& buffers);

 private:
  void fail(const std::string& detail);
  void end();
  std::string name_;
  int cases_ = 0, failed_ = 0, shown_ = 0;
  bool open_ = false, bad_ = false;
  double worst_ = 0;  // largest error as a share of what was allowed
};

void report_segfaults();  // with the name of the case
int passed();
int failed();

void verbs(const std::string& level);
void kl_div(const std::string& level);
void kl_div_topk(const std::string& level);
void linear_4bit(const std::string& level);
void linear_8bit(const std::string& level);
void sparse(const std::string& level);
void encoder(const std::string& level);

}  // namespace check
