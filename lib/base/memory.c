/* memory.c - the process heap. */
#include "base/base.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 64, LARGE = 4 * CV_HUGE_PAGE };

static void *allocate(size_t bytes) {
    const size_t to = bytes >= LARGE ? CV_HUGE_PAGE : ALIGNMENT;
    const size_t rounded = (CV_MAX(bytes, 1) + to - 1) / to * to;
    void *memory = bytes <= PTRDIFF_MAX ? aligned_alloc(to, rounded) : NULL;
    if (memory && bytes >= LARGE) cv_huge_ask(memory, rounded);
    if (!memory) cv_fail(COVEY_ERR_NO_MEMORY, "no memory for %zu bytes; free some or use more ranks", bytes);
    return memory;
}

void *cv_alloc(size_t bytes) {
    void *memory = allocate(bytes);
    if (memory) memset(memory, 0, bytes);
    return memory;
}

void cv_free(void *memory) { free(memory); }

covey_status cv_grow(void *array_pointer, size_t *capacity, size_t count, size_t each) {
    if (count <= *capacity) return COVEY_OK;
    size_t wanted = CV_MAX(count, *capacity + *capacity / 2);
    size_t bytes;
    if (__builtin_mul_overflow(wanted, each, &bytes))
        return cv_fail(COVEY_ERR_NO_MEMORY, "no memory for %zu elements of %zu bytes", wanted, each);
    void *old;
    memcpy(&old, array_pointer, sizeof old);
    void *grown = allocate(bytes);
    if (!grown) return COVEY_ERR_NO_MEMORY;
    if (old) memcpy(grown, old, *capacity * each);
    free(old);
    memcpy(array_pointer, &grown, sizeof grown);
    *capacity = wanted;
    return COVEY_OK;
}
