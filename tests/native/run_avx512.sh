#!/usr/bin/env bash
# Runs compare_levels at the avx512 level on any x86-64 Debian, whatever its CPU: builds it as a static program, boots a
# Debian kernel that runs nothing else inside the emulator Bochs (CPU model corei7_icelake_u), prints what the program
# prints and exits with its status (124 when the machine did not finish in PYKD_EMULATION_SECONDS, 900 by default).
#
#   tests/native/run_avx512.sh [LEVEL ...]      levels of compare_levels, default avx512
#
# PYKD_BOCHS=1 tells the program one thing: Bochs 2.7 rounds halves up, not to even, where it makes float16.
# It installs nothing. Needed, of Debian 12 (bookworm):
#   apt-get install g++ cmake make bochs bochsbios bochs-term grub-common grub-pc-bin xorriso mtools busybox-static cpio
# and a kernel image: PYKD_KERNEL=/path/to/vmlinuz, or else the package behind linux-image-cloud-amd64 is downloaded
# into the temporary folder and unpacked there.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

missing=()
need() { command -v "$1" > "$work/found" || missing+=("$2"); }
need_file() { compgen -G "$1" > "$work/found" || missing+=("$2"); }
need c++ g++
need cmake cmake
need make make
need bochs bochs
need grub-mkrescue grub-common
need xorriso xorriso
need mformat mtools
need busybox busybox-static
need cpio cpio
need script bsdutils
need_file '/usr/lib/grub/i386-pc/cdboot.img' grub-pc-bin
need_file '/usr/share/bochs/BIOS-bochs-latest' bochsbios
need_file '/usr/lib/*/bochs/plugins/libbx_term_gui.so' bochs-term
if [ ${#missing[@]} -gt 0 ]; then
  echo "Missing Debian packages: ${missing[*]}. Install them with: apt-get install ${missing[*]}" >&2
  exit 2
fi

echo "Building compare_levels ..."
cmake -S . -B build/avx512 -DPYKD_PYTHON=OFF -DPYKD_CUDA=OFF -DPYKD_NATIVE_TESTS=ON -DCMAKE_EXE_LINKER_FLAGS=-static \
  > "$work/cmake.log" || { cat "$work/cmake.log"; exit 2; }
cmake --build build/avx512 --parallel 2 --target compare_levels > "$work/make.log" 2>&1 || { cat "$work/make.log"; exit 2; }

kernel=${PYKD_KERNEL:-}
if [ -z "$kernel" ]; then
  package=$(apt-cache show --no-all-versions linux-image-cloud-amd64 | sed -n 's/^Depends: \(linux-image-[^ ,]*\).*/\1/p')
  echo "Downloading $package ..."
  (cd "$work" && apt-get download -qq "$package" 2> apt.log) || { cat "$work/apt.log" >&2; exit 2; }
  dpkg-deb -x "$work/$package"_*.deb "$work/kernel"
  kernel=$(ls "$work"/kernel/boot/vmlinuz-*)
fi

# The machine: the kernel, and an initial file system with busybox, the program and what starts it.
mkdir -p "$work/files/bin" "$work/files/dev" "$work/iso/boot/grub"
cp "$(command -v busybox)" "$work/files/bin/busybox"
cp build/avx512/tests/native/compare_levels "$work/files/compare_levels"
cat > "$work/files/init" << INIT
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs devtmpfs /dev
exec > /dev/ttyS0 2>&1
export OMP_WAIT_POLICY=passive PYKD_BOCHS=1
/compare_levels ${*:-avx512}
echo "exit status \$?"
/bin/busybox sleep 2
/bin/busybox poweroff -f
INIT
chmod +x "$work/files/init"
(cd "$work/files" && find . | cpio --quiet -o -H newc | gzip -1) > "$work/iso/boot/initrd.gz"
cp "$kernel" "$work/iso/boot/vmlinuz"
# Cleared CPU features, which Bochs 2.7 announces in a way that the kernel cannot use: fsrm without erms (its memmove then
# runs over everything), a compacted xsave area of another size than its parts, and pku inside of that area.
cat > "$work/iso/boot/grub/grub.cfg" << 'GRUB'
set timeout=0
linux /boot/vmlinuz console=ttyS0 quiet loglevel=1 panic=-1 mitigations=off tsc=reliable no_timer_check lsm=capability cryptomgr.notests random.trust_cpu=on clearcpuid=fsrm,xsavec,xsaves,pku
initrd /boot/initrd.gz
boot
GRUB
grub-mkrescue -o "$work/machine.iso" "$work/iso" > "$work/grub.log" 2>&1 || { cat "$work/grub.log" >&2; exit 2; }

cat > "$work/bochsrc" << BOCHS
plugin_ctrl: speaker=0, sb16=0
display_library: term
cpu: model=corei7_icelake_u, count=1, ips=100000000
clock: sync=none, time0=1700000000
megs: 512
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=$work/machine.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial
log: $work/bochs.log
panic: action=fatal
BOCHS
echo c > "$work/debugger"  # Debian builds Bochs with its debugger, which waits for a command: continue

echo "Booting the emulated machine ..."
touch "$work/serial"
TERM=vt100 timeout -k 5 "${PYKD_EMULATION_SECONDS:-900}" \
  script -qec "bochs -q -f $work/bochsrc -rc $work/debugger" "$work/screen" > "$work/screen.out" 2>&1 < /dev/null &
emulator=$!
tail -n +1 -f --pid=$emulator "$work/serial" | tr -d '\r' | sed -u '/reboot: Power down/d'
stopped=0
wait $emulator || stopped=$?
status=$(tr -d '\r' < "$work/serial" | sed -n 's/^exit status \([0-9]*\)$/\1/p' | tail -n 1)
if [ -z "$status" ]; then
  echo "The emulated machine stopped before the program did; the end of its log:" >&2
  tail -n 20 "$work/bochs.log" >&2
  [ "$stopped" = 124 ] && exit 124
  exit 1
fi
exit "$status"
