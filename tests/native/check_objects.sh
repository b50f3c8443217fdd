#!/usr/bin/env bash
# Checks that no code of one instruction-set level can be executed at another: object files are linked into one module,
# and the linker keeps a single copy of an inline function that several of them define.
#
#   tests/native/check_objects.sh scalar|avx2|avx512|avx512_bf16 OBJECT ...
#
# - others than scalar: every function or object that other files may replace or see is in the namespace of the level.
# - scalar: no instruction encoded for AVX; avx2: none with a 512-bit or a mask register; avx512: none of AVX512_BF16.
set -euo pipefail
level=$1
shift
case $level in
  scalar) forbidden='^\s+[0-9a-f]+:\s+v[a-z]' ;;
  avx2) forbidden='%zmm|%k[0-7]' ;;
  avx512) forbidden='bf16ps' ;;
  avx512_bf16) forbidden='' ;;
  *) echo "unknown level $level; use scalar, avx2, avx512 or avx512_bf16" >&2; exit 2 ;;
esac
found=0
for object in "$@"; do
  if [ "$level" != scalar ]; then
    # The pointer to the language's own exception handler is data and the same for all.
    if nm -C --defined-only --extern-only "$object" | grep -v -e "pykd::$level::" -e ' V DW\.ref\.__gxx_personality_v0$'; then
      echo "$object: the symbols above are outside of pykd::$level" >&2
      found=1
    fi
  fi
  if [ -n "$forbidden" ] && objdump -d --no-show-raw-insn "$object" | grep -E -m 3 "$forbidden"; then
    echo "$object: the instructions above do not belong to level $level" >&2
    found=1
  fi
done
exit $found
