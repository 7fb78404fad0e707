/* huge.c - pages of 2 MiB: what the system grants, and asking for them.
 *
 * Regions ask for huge pages where they are mapped (region.c), large blocks of the process heap here; whether they get
 * them is the system's to say, apart for shared memory and for the heap. Where it denies them to shared memory, full
 * pages of tables may still be made huge (sparse/pages.c). */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "base/base.h"

#define FOLDER "/sys/kernel/mm/transparent_hugepage/"

void cv_huge_ask(void *memory, size_t bytes) { madvise(memory, bytes, MADV_HUGEPAGE); }

/* The word in brackets of such a file: "always [madvise] never"; "" where there is none. */
static void chosen(const char *path, char *word, size_t bytes) {
    char line[128] = "";
    FILE *file = fopen(path, "re");
    word[0] = '\0';
    if (!file) return;
    if (fgets(line, sizeof line, file)) {
        const char *open = strchr(line, '['), *end = open ? strchr(open, ']') : NULL;
        if (end) snprintf(word, bytes, "%.*s", (int) (end - open - 1), open + 1);
    }
    fclose(file);
}

/* Advice about nothing is refused only by a kernel that does not know it. */
bool cv_huge_collapses(void) { return !madvise(NULL, 0, CV_MADV_COLLAPSE); }

static bool grants(const char *word) { return word[0] && strcmp(word, "never") != 0 && strcmp(word, "deny") != 0; }

void cv_huge_tell(struct cv_text *text) {
    char heap[32], shared[32];
    chosen(FOLDER "enabled", heap, sizeof heap);
    chosen(FOLDER "shmem_enabled", shared, sizeof shared);
    const bool collapses = strcmp(shared, "deny") != 0 && cv_huge_collapses();
    cv_text_print(text, "huge pages: buffers %s, tables %s", grants(heap) ? "granted" : "not granted",
                  grants(shared) ? "granted" : collapses ? "made as they fill" : "not granted");
    if (!grants(shared) && !collapses && shared[0])
        cv_text_print(text, " (as root: echo advise > " FOLDER "shmem_enabled)");
    if (!grants(heap) && heap[0]) cv_text_print(text, " (as root: echo madvise > " FOLDER "enabled)");
    cv_text_print(text, "\n");
}
