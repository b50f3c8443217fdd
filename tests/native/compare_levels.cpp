// Usage: compare_levels [LEVEL ...]    (without arguments: every level that this CPU runs)
//
// Runs the vector verbs and every op of csrc/ops.h at each level on seeded data, over awkward shapes, element types and
// options, twice: with buffers that end and with buffers that begin at an inaccessible page. Results are compared with
// plain double-precision loops, so that no level is the measure of another. Prints a line per group of cases and a
// total; the exit status is 0 if nothing failed.
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"

int main(int count, char** names) {
  check::report_segfaults();
  std::vector<std::string> levels(names + 1, names + count);
  if (levels.empty()) levels = pykd::isa_levels();
  for (const std::string& level : levels) {
    try {
      pykd::set_isa(level);
    } catch (const std::invalid_argument& error) {
      printf("%s\n", error.what());
      return 2;
    }
    for (const check::Edge edge : {check::Edge::kEnd, check::Edge::kBegin}) {
      check::set_edge(edge);
      printf("== %s, buffers %s at an inaccessible page\n", level.c_str(), edge == check::Edge::kEnd ? "end" : "begin");
      check::verbs(level);
      check::kl_div(level);
      check::kl_div_topk(level);
      check::linear_4bit(level);
      check::linear_8bit(level);
      check::sparse(level);
      check::encoder(level);
    }
  }
  printf("%d passed, %d failed\n", check::passed(), check::failed());
  return check::failed() == 0 && check::passed() > 0 ? 0 : 1;
}
