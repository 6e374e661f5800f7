#!/bin/bash
# Boots a systemd as PID 1 of its own name spaces, on a throw-away overlay of this machine's root.
#
#   unshare --fork --kill-child=SIGKILL --pid --mount --uts --ipc --net --cgroup --propagation private \
#       bash boot.sh SCRATCH [SOURCE=TARGET ...]
#
# SCRATCH is an empty folder for mounts, each SOURCE is bound read-only to TARGET. Nothing is written to the machine's
# own file systems: the upper layer is in memory and goes with the name space.
set -eu
scratch=$1; shift
root=$scratch/root

mount -t tmpfs -o size=3g,mode=755 tmpfs "$scratch"
mkdir "$scratch/upper" "$scratch/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$scratch/upper,workdir=$scratch/work" "$root"

for pair in "$@"; do
    source=${pair%%=*} target=$root${pair#*=}
    if [ -d "$source" ]; then mkdir -p "$target"; else mkdir -p "${target%/*}"; touch "$target"; fi
    mount --rbind "$source" "$target"
    mount -o remount,bind,ro "$target"
done

mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
# A machine with cgroup v1 has no folder for this one.
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"

# A machine of its own: no name, no journal, none of the services that this one has enabled.
: > "$root/etc/machine-id"
rm -rf "$root/var/log/journal" "$root"/etc/systemd/system/*.wants
mkdir -p "$root/var/log/journal"

cd "$root"
mkdir .old
pivot_root . .old
umount -l /.old
exec env -i container=dropforge-test PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=sysinit.target --log-target=journal --show-status=0 < /dev/null
