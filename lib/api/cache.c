/* cache.c - small texts kept in files from run to run. One that cannot be read is as good as none, one that cannot be
 * written is no error. */
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "api/context.h"

enum { FILE_MAX = 1 << 20 };

bool cv_cache_read(const char *path, struct cv_text *out) {
    char piece[4096];
    FILE *file = path[0] ? fopen(path, "re") : NULL;
    if (!file) return false;
    for (size_t bytes; out->length < FILE_MAX && (bytes = fread(piece, 1, sizeof piece - 1, file)) > 0;) {
        piece[bytes] = '\0';
        if (strlen(piece) < bytes) break; /* no text */
        cv_text_print(out, "%s", piece);
    }
    const bool whole = feof(file) && out->data;
    fclose(file);
    return whole;
}

static void make_folders(const char *path) {
    char part[CV_PATH_BYTES];
    for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        snprintf(part, sizeof part, "%.*s", (int) (slash - path), path);
        mkdir(part, 0700);
    }
}

void cv_cache_write(const char *path, const struct cv_text *text) {
    char beside[CV_PATH_BYTES + 32];
    if (!path[0]) return;
    snprintf(beside, sizeof beside, "%s.%d", path, (int) getpid());
    make_folders(path);
    FILE *file = text->data ? fopen(beside, "wxe") : NULL;
    if (!file) return;
    const bool written = fwrite(text->data, 1, text->length, file) == text->length;
    if (fclose(file) != 0 || !written || rename(beside, path) != 0) unlink(beside);
}
