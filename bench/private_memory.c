/* private_memory.c - preloaded into a rank of a fixed world, makes the memory of its tables private, as it would be if
 * it did not have to outlive the process: what bench_elastic.py compares shared memory with. Files keep their lengths
 * and stay empty. Says at the end how many mappings it changed, so that a run that changed none is noticed. */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static int changed;

static bool is_of_tables(int fd) {
    char link[64], name[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t bytes = readlink(link, name, sizeof name - 1);
    name[bytes < 0 ? 0 : bytes] = 0;
    return strstr(name, "memfd:covey-vault");
}

/* Compiled like the library, so it has the name that the library calls. */
void *mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset) {
    if (fd >= 0 && flags & MAP_SHARED && is_of_tables(fd)) {
        flags = (flags & ~MAP_SHARED) | MAP_PRIVATE | MAP_ANONYMOUS;
        fd = -1;
        offset = 0;
        __atomic_fetch_add(&changed, 1, __ATOMIC_RELAXED);
    }
    return (void *) syscall(SYS_mmap, address, bytes, protection, flags, fd, offset);
}

__attribute__((destructor)) static void tell(void) {
    if (changed) fprintf(stderr, "private memory: %d mappings\n", changed);
}
