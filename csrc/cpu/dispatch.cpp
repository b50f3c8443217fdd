#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace pykd {
namespace {

struct Level {
  const char* name;
  Table table;
  bool (*runs_here)();
};

#define PYKD_ENTRY(op, Args) &op,

bool always() { return true; }

#ifdef PYKD_X86
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt");
}

bool has_avx512() {
  __builtin_cpu_init();
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

namespace tables {
using namespace pykd::scalar;
const Table scalar_table = {PYKD_OPS(PYKD_ENTRY)};
}  // namespace tables

#ifdef PYKD_X86
namespace tables_avx2 {
using namespace pykd::avx2;
const Table table = {PYKD_OPS(PYKD_ENTRY)};
}  // namespace tables_avx2
namespace tables_avx512 {
using namespace pykd::avx512;
const Table table = {PYKD_OPS(PYKD_ENTRY)};
}  // namespace tables_avx512
Table with_bf16(Table table) {
  table.linear_4bit = avx512_bf16::linear_4bit;
  return table;
}
#endif
#undef PYKD_ENTRY

const Level kLevels[] = {
    {"scalar", tables::scalar_table, always},
#ifdef PYKD_X86
    {"avx2", tables_avx2::table, has_avx2},
    {"avx512", tables_avx512::table, has_avx512},
    {"avx512_bf16", with_bf16(tables_avx512::table), has_avx512_bf16},
#endif
};

const Level* find(const std::string& name) {
  for (const Level& level : kLevels)
    if (name == level.name && level.runs_here()) return &level;
  return nullptr;
}

std::string known() {
  std::string names;
  for (const std::string& name : isa_levels()) names += (names.empty() ? "" : ", ") + name;
  return names;
}

const Level* choose() {
  if (const char* wanted = std::getenv("PYKD_ISA")) {
    if (const Level* level = find(wanted)) return level;
    throw std::invalid_argument("PYKD_ISA=" + std::string(wanted) + " is not a level this CPU runs; use one of " +
                                known() + ", or unset it");
  }
  const Level* best = &kLevels[0];
  for (const Level& level : kLevels)
    if (level.runs_here()) best = &level;
  return best;
}

const Level*& current() {
  static const Level* level = choose();
  return level;
}

}  // namespace

const Table& table() { return current()->table; }

std::string isa() { return current()->name; }

void set_isa(const std::string& name) {
  const Level* level = find(name);
  if (!level)
    throw std::invalid_argument("instruction-set level '" + name + "' does not run on this CPU; it runs " + known());
  current() = level;
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels)
    if (level.runs_here()) names.push_back(level.name);
  return names;
}

}  // namespace pykd
