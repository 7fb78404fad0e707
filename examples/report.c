/* report.c - see report.h. */
#include "report.h"

#include <cblas.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void cpu_model(char *text, size_t bytes) {
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "re");
    snprintf(text, bytes, "unknown");
    while (file && fgets(line, sizeof line, file)) {
        char *colon = strchr(line, ':');
        if (colon && strncmp(line, "model name", 10) == 0) {
            line[strcspn(line, "\n")] = '\0';
            snprintf(text, bytes, "%s", colon + 1 + strspn(colon + 1, " "));
            break;
        }
    }
    if (file) {
        fclose(file);
    }
}

json_t *host_facts(void) {
    char cpu[256];
    cpu_model(cpu, sizeof cpu);
    return json_pack("{s:s, s:s, s:s, s:i}", "cpu", cpu, "blas", openblas_get_config(), "blas_core",
                     openblas_get_corename(), "blas_threads", openblas_get_num_threads());
}

/* 0, or an errno. */
static int write_text(int fd, const char *text, bool sync) {
    size_t left = strlen(text);
    while (left > 0) {
        ssize_t n = write(fd, text, left);
        if (n < 0 && errno != EINTR) {
            return errno;
        }
        if (n > 0) {
            text += n;
            left -= (size_t) n;
        }
    }
    return sync && fsync(fd) != 0 ? errno : 0;
}

static int write_file(const char *path, int flags, const char *text, bool sync) {
    int fd = open(path, O_WRONLY | O_CLOEXEC | flags, 0666);
    if (fd < 0) {
        return errno;
    }
    int error = write_text(fd, text, sync);
    return close(fd) != 0 && error == 0 ? errno : error;
}

/* Under another name first and then renamed: whoever looks finds the old file or the whole new one, and a full disk
 * leaves the old one alone. What is no ordinary file (a pipe, /dev/stdout) is written to as it is. */
static int replace_file(const char *path, const char *text) {
    struct stat old;
    char other[4096];
    if (stat(path, &old) == 0 && !S_ISREG(old.st_mode)) {
        return write_file(path, 0, text, false);
    }
    if (snprintf(other, sizeof other, "%s.%d.tmp", path, (int) getpid()) >= (int) sizeof other) {
        return ENAMETOOLONG;
    }
    int error = write_file(other, O_CREAT | O_TRUNC, text, true);
    if (error == 0 && rename(other, path) != 0) {
        error = errno;
    }
    if (error != 0) {
        unlink(other);
    }
    return error;
}

bool write_text_file(const char *what, const char *path, const char *text) {
    int error = text ? replace_file(path, text) : ENOMEM;
    if (error != 0) {
        fprintf(stderr, "dlrm: cannot write %s %s: %s\n", what, path, strerror(error));
    }
    return error == 0;
}

bool write_report(const char *path, json_t *report) {
    char *text = report ? json_dumps(report, JSON_INDENT(2) | JSON_REAL_PRECISION(9)) : NULL;
    bool ok = write_text_file("the report", path, text);
    free(text);
    json_decref(report);
    return ok;
}
