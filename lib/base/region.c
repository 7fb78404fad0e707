/* region.c - a memfd mapped once over more addresses than it has bytes. */
#include "base/region.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

/* A system call that is already running when its process is killed goes on; in pieces it ends soon. A piece is one huge
 * page, because only a whole one is sure to be given back. */
enum { PIECE = 2 << 20 };

static const struct cv_region closed = {.fd = -1};

static size_t page_size(void) { return (size_t) sysconf(_SC_PAGESIZE); }

/* Rounded up to pages; 0 when that overflows. */
static size_t whole_pages(size_t bytes) {
    size_t page = page_size();
    return bytes > SIZE_MAX - page ? 0 : (bytes + page - 1) / page * page;
}

/* Beyond the limit on file sizes the kernel would send SIGXFSZ, whose default is to kill. */
static covey_status set_length(int fd, size_t bytes) {
    struct rlimit limit;
    if (!getrlimit(RLIMIT_FSIZE, &limit) && limit.rlim_cur != RLIM_INFINITY && bytes > limit.rlim_cur)
        return cv_fail(COVEY_ERR_NO_MEMORY,
                       "a region of %zu bytes is over the limit on file sizes (%llu bytes); raise ulimit -f", bytes,
                       (unsigned long long) limit.rlim_cur);
    if (ftruncate(fd, (off_t) bytes))
        return cv_fail(COVEY_ERR_NO_MEMORY, "cannot make a region %zu bytes long: %s", bytes, strerror(errno));
    return COVEY_OK;
}

static covey_status file_length(int fd, size_t *bytes) {
    struct stat about;
    if (fstat(fd, &about)) return cv_fail(COVEY_ERR_IO, "cannot ask for a region's length: %s", strerror(errno));
    *bytes = (size_t) about.st_size;
    return COVEY_OK;
}

/* At an address that begins a huge page: only there can the pages of the file be mapped as huge ones. */
static char *map_aligned(int fd, size_t offset, size_t bytes) {
    const int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_NORESERVE;
    if (bytes < CV_HUGE_PAGE || offset % CV_HUGE_PAGE)
        return mmap(NULL, bytes, protection, flags, fd, (off_t) offset);
    if (bytes > PTRDIFF_MAX - CV_HUGE_PAGE) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    const size_t wide = bytes + CV_HUGE_PAGE;
    char *found = mmap(NULL, wide, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return found;
    const size_t skip = CV_HUGE_PAGE - (uintptr_t) found % CV_HUGE_PAGE;
    char *base = mmap(found + skip, bytes, protection, flags | MAP_FIXED, fd, (off_t) offset);
    const int error = errno;
    if (base == MAP_FAILED) {
        munmap(found, wide);
        errno = error;
        return base;
    }
    munmap(found, skip);
    if (skip < CV_HUGE_PAGE) munmap(base + bytes, CV_HUGE_PAGE - skip);
    return base;
}

/* Maps `reserve` bytes from offset on, or fewer if there are not so many addresses, but not fewer than `least`. */
static covey_status map(struct cv_region *region, int fd, size_t offset, size_t least, size_t reserve) {
    char *base = MAP_FAILED;
    for (;;) {
        base = map_aligned(fd, offset, reserve);
        if (base != MAP_FAILED || errno != ENOMEM || reserve <= least) break;
        reserve = CV_MAX(whole_pages(reserve / 2), least);
    }
    if (base == MAP_FAILED)
        return cv_fail(COVEY_ERR_NO_MEMORY, "cannot map a region of %zu bytes: %s; ulimit -v may be too low", reserve,
                       strerror(errno));
    madvise(base, reserve, MADV_DONTFORK);
    madvise(base, reserve, MADV_DONTDUMP);
    madvise(base, reserve, MADV_HUGEPAGE);
    region->fd = fd;
    region->base = base;
    region->reserved = reserve;
    return COVEY_OK;
}

covey_status cv_region_file(const char *name, size_t bytes, int *out) {
    *out = -1;
    bytes = whole_pages(CV_MAX(bytes, 1));
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return cv_fail(COVEY_ERR_IO, "cannot create the region %s: %s", name, strerror(errno));
    covey_status status = set_length(fd, bytes);
    if (status == COVEY_OK && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK))
        status = cv_fail(COVEY_ERR_IO, "cannot seal the region %s: %s", name, strerror(errno));
    if (status != COVEY_OK)
        close(fd);
    else
        *out = fd;
    return status;
}

covey_status cv_region_create(struct cv_region *region, const char *name, size_t bytes, size_t reserve) {
    *region = closed;
    size_t length = whole_pages(CV_MAX(bytes, 1));
    size_t addresses = whole_pages(CV_MAX(bytes, CV_MAX(reserve, 1)));
    if (!length || !addresses || length > PTRDIFF_MAX)
        return cv_fail(COVEY_ERR_NO_MEMORY, "a region of %zu bytes is more than there can be", bytes);
    int fd = -1;
    CV_TRY(cv_region_file(name, length, &fd));
    covey_status status = map(region, fd, 0, length, CV_MIN(addresses, PTRDIFF_MAX));
    if (status != COVEY_OK) {
        close(fd);
        return status;
    }
    region->bytes = length;
    return COVEY_OK;
}

static covey_status map_part(struct cv_region *region, int fd, size_t offset, size_t length) {
    size_t file = 0;
    CV_TRY(file_length(fd, &file));
    if (offset % page_size()) return cv_fail(COVEY_ERR_INVALID, "offset %zu into a region is inside a page", offset);
    if (offset >= file || length > file - offset)
        return cv_fail(COVEY_ERR_INVALID, "bytes %zu to %zu of a region of %zu bytes", offset, offset + length, file);
    if (!length) length = file - offset;
    CV_TRY(map(region, fd, offset, length, length));
    region->bytes = length;
    return COVEY_OK;
}

covey_status cv_region_map(struct cv_region *region, int fd, size_t offset, size_t length) {
    *region = closed;
    covey_status status = map_part(region, fd, offset, length);
    if (status != COVEY_OK) close(fd);
    return status;
}

static covey_status map_growing(struct cv_region *region, int fd, size_t reserve) {
    size_t file = 0;
    CV_TRY(file_length(fd, &file));
    size_t addresses = whole_pages(CV_MAX(file, reserve));
    if (!file || !addresses)
        return cv_fail(COVEY_ERR_INVALID, "a region of %zu bytes with %zu reserved cannot be adopted", file, reserve);
    CV_TRY(map(region, fd, 0, file, addresses));
    region->bytes = file;
    return COVEY_OK;
}

covey_status cv_region_adopt(struct cv_region *region, int fd, size_t reserve) {
    *region = closed;
    covey_status status = map_growing(region, fd, reserve);
    if (status != COVEY_OK) close(fd);
    return status;
}

covey_status cv_region_grow(struct cv_region *region, size_t bytes) {
    if (bytes <= region->bytes) return COVEY_OK;
    size_t length = whole_pages(bytes);
    if (!length || length > region->reserved)
        return cv_fail(COVEY_ERR_NO_MEMORY, "a region cannot grow to %zu bytes: %zu are reserved for it", bytes,
                       region->reserved);
    size_t file = 0;
    CV_TRY(file_length(region->fd, &file));
    if (file < length) {
        CV_TRY(set_length(region->fd, length));
        file = length;
    }
    region->bytes = CV_MIN(file, region->reserved);
    return COVEY_OK;
}

void cv_region_discard(struct cv_region *region, size_t offset, size_t bytes) {
    size_t page = page_size();
    size_t at = (offset + page - 1) / page * page;
    size_t end = (offset + bytes) / page * page;
    while (at < end) {
        size_t piece = CV_MIN(end - at, PIECE - at % PIECE);
        if (madvise(region->base + at, piece, MADV_REMOVE)) memset(region->base + at, 0, piece);
        at += piece;
    }
}

size_t cv_region_missing(const struct cv_region *region, size_t offset) {
    unsigned char here[CV_HUGE_PAGE / 4096];
    const size_t pages = CV_HUGE_PAGE / page_size();
    if (offset + CV_HUGE_PAGE > region->bytes || pages > sizeof here ||
        mincore(region->base + offset, CV_HUGE_PAGE, here))
        return CV_HUGE_PAGE;
    size_t missing = 0;
    for (size_t i = 0; i < pages; i++) missing += !(here[i] & 1);
    return missing * page_size();
}

bool cv_region_collapse(const struct cv_region *region, size_t offset) {
    return !madvise(region->base + offset, CV_HUGE_PAGE, CV_MADV_COLLAPSE);
}

size_t cv_region_resident(const struct cv_region *region) {
    struct stat about;
    return region->base && !fstat(region->fd, &about) ? (size_t) about.st_blocks * 512 : 0;
}

void cv_region_close(struct cv_region *region) {
    if (!region) return;
    if (region->base) {
        munmap(region->base, region->reserved);
        close(region->fd);
    }
    *region = closed;
}
