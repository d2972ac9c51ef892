/* Loaded into a server by LD_PRELOAD. It logs what has surely reached the disk, fills the disk, and
   moves the clock.

   FAULTS_SYNCED   a file that gets a line "inode size" for each completed fsync or fdatasync: the
                   size is that from before the call, which is what the call has surely covered
   FAULTS_CONTROL  a file of two numbers of 64 bits, shared with who plays the faults: seconds that
                   are added to the clock, and whether the disk is full for append-only files */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t shift;
    int64_t full;
};
static volatile struct control *control;
static int synced = -1;

__attribute__((constructor)) static void begin(void) {
    const char *log = getenv("FAULTS_SYNCED"), *shared = getenv("FAULTS_CONTROL");
    if (log)
        synced = open(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    int file = shared ? open(shared, O_RDWR | O_CLOEXEC) : -1;
    if (file >= 0) {
        void *place = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (place != MAP_FAILED)
            control = place;
        close(file);
    }
}

static int64_t shift(void) { return control ? control->shift : 0; }

static int sync_and_log(int file, int number) {
    struct stat before;
    int is_file = fstat(file, &before) == 0 && S_ISREG(before.st_mode);
    int result = syscall(number, file);
    if (result == 0 && is_file && synced >= 0) {
        char line[64];
        int length = snprintf(line, sizeof line, "%llu %lld\n", (unsigned long long)before.st_ino,
                              (long long)before.st_size);
        syscall(SYS_write, synced, line, length);
    }
    return result;
}

int fsync(int file) { return sync_and_log(file, SYS_fsync); }
int fdatasync(int file) { return sync_and_log(file, SYS_fdatasync); }

static int is_append_only(int file) {
    char link[64], name[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, name, sizeof name - 1);
    if (length < 0)
        return 0;
    name[length] = 0;
    return strstr(name, "appendonlydir/") != NULL;
}

/* A disk that gets full takes a part of what is written, and then nothing. */
ssize_t write(int file, const void *bytes, size_t count) {
    static int took_a_part;
    if (control && control->full && is_append_only(file)) {
        took_a_part = !took_a_part;
        if (!took_a_part || count < 2) {
            errno = ENOSPC;
            return -1;
        }
        count /= 2;
    }
    return syscall(SYS_write, file, bytes, count);
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    if (syscall(SYS_clock_gettime, CLOCK_REALTIME, &precise))
        return -1;
    now->tv_sec = precise.tv_sec + shift();
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*ask)(clockid_t, struct timespec *);
    if (!ask)
        ask = dlsym(RTLD_NEXT, "clock_gettime");
    int result = ask(clock, now);
    if (result == 0 && clock == CLOCK_REALTIME)
        now->tv_sec += shift();
    return result;
}

time_t time(time_t *place) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (place)
        *place = now.tv_sec;
    return now.tv_sec;
}
