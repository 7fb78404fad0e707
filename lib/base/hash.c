/* hash.c - fingerprints of bytes (XXH3 gives the same on every CPU) and random bytes from the kernel. */
#include "base/base.h"

#include <errno.h>
#include <string.h>
#include <sys/random.h>
#include <xxhash.h>

uint64_t cv_hash_bytes(const void *data, size_t bytes, uint64_t seed) {
    return XXH3_64bits_withSeed(data, bytes, seed);
}

covey_hash cv_hash_bytes128(const void *data, size_t bytes, uint64_t seed) {
    XXH128_hash_t hash = XXH3_128bits_withSeed(data, bytes, seed);
    return (covey_hash){.low = hash.low64, .high = hash.high64};
}

covey_status cv_random_bytes(void *out, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        ssize_t got = getrandom((char *) out + done, bytes - done, 0);
        if (got < 0 && errno != EINTR)
            return cv_fail(COVEY_ERR_IO, "the kernel gives no random bytes: %s", strerror(errno));
        if (got > 0) done += (size_t) got;
    }
    return COVEY_OK;
}
