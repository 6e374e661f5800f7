/* A disk that fails on purpose: preloaded into a process, it makes the n-th call of one kind on files below one folder
 * fail once, or from then on.
 *
 *   FAULT_ROOT=/folder FAULT_CALL=write|fsync|rename FAULT_ERRNO=28 FAULT_AT=7 FAULT_FOREVER=0
 *   FAULT_ERRNO=0: it is not failed, but ends the process by SIGKILL before it
 *   FAULT_WHILE=/file: fail only while this file is there
 *   FAULT_ONCE=/file: fail only for the process that makes this file
 *   FAULT_PROGRAM=text that the process's command line must hold (its children inherit the preload)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int mine(void) {
    static int known = -1;
    if (known < 0) {
        char line[8192];
        const char *wanted = getenv("FAULT_PROGRAM");
        known = wanted == NULL;
        int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
        ssize_t (*real_read)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
        ssize_t size = fd >= 0 ? real_read(fd, line, sizeof line - 1) : 0;
        if (fd >= 0) close(fd);
        for (ssize_t at = 0; at < size; at++)
            if (line[at] == 0) line[at] = ' ';
        line[size > 0 ? size : 0] = 0;
        if (wanted && strstr(line, wanted)) known = 1;
    }
    return known;
}

static int below(const char *path) {
    const char *root = getenv("FAULT_ROOT");
    return root && path && strncmp(path, root, strlen(root)) == 0 && !strstr(path, "points.txt");
}

static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}

static int fails(const char *call) {
    static int count = 0;
    const char *wanted = getenv("FAULT_CALL");
    if (!wanted || strcmp(wanted, call) || !mine()) return 0;
    const char *during = getenv("FAULT_WHILE");
    if (during && access(during, F_OK)) return 0;
    int at = atoi(getenv("FAULT_AT") ? getenv("FAULT_AT") : "1");
    int now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (now == at || (now > at && getenv("FAULT_FOREVER") && atoi(getenv("FAULT_FOREVER")))) {
        const char *once = getenv("FAULT_ONCE");
        if (once) {
            int fd = open(once, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
            if (fd < 0) return 0;
            close(fd);
        }
        errno = atoi(getenv("FAULT_ERRNO"));
        if (!errno) kill(getpid(), SIGKILL);
        return 1;
    }
    return 0;
}

ssize_t write(int fd, const void *data, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    return below_fd(fd) && fails("write") ? -1 : real(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    ssize_t (*real)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    return below_fd(fd) && fails("write") ? -1 : real(fd, data, size, at);
}

int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return below_fd(fd) && fails("fsync") ? -1 : real(fd);
}

int fdatasync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fdatasync");
    return below_fd(fd) && fails("fsync") ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    return below(to) && fails("rename") ? -1 : real(from, to);
}
