/* log.c - lines for people, on stderr or where the user wants them. */
#include "base/base.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>

enum { LINE_MAX_BYTES = 1024, LEVEL_UNKNOWN = -1 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static covey_log_function sink; /* under lock */
static void *sink_user;         /* under lock */
static atomic_int shown = LEVEL_UNKNOWN; /* COVEY_LOG, read at the first line */

static const char *level_name(int level) {
    static const char *const names[] = {"error", "warning", "info", "debug"};
    return names[CV_MIN(CV_MAX(level, CV_ERROR), CV_DEBUG)];
}

/* Not by cv_setting_integer: logging must not replace the sentence of the failure that is being logged. */
static int shown_level(void) {
    int level = atomic_load_explicit(&shown, memory_order_relaxed);
    if (level != LEVEL_UNKNOWN) return level;
    const char *value = cv_setting("COVEY_LOG");
    level = CV_WARN;
    if (value[0] >= '0' && value[0] <= '3' && !value[1])
        level = value[0] - '0';
    else
        fprintf(stderr, "covey: warning: log: COVEY_LOG=%s is not a level from 0 (errors) to 3 (debug); 1 holds\n",
                value);
    atomic_store_explicit(&shown, level, memory_order_relaxed);
    return level;
}

void cv_log(int level, const char *topic, const char *format, ...) {
    if (level > shown_level()) return;
    char line[LINE_MAX_BYTES];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);

    pthread_mutex_lock(&lock);
    covey_log_function function = sink;
    void *user = sink_user;
    pthread_mutex_unlock(&lock);
    if (function)
        function(user, level, topic, line);
    else
        fprintf(stderr, "covey: %s: %s: %s\n", level_name(level), topic, line);
}

void cv_log_set(covey_log_function function, void *user) {
    pthread_mutex_lock(&lock);
    sink = function;
    sink_user = user;
    pthread_mutex_unlock(&lock);
    atomic_store_explicit(&shown, LEVEL_UNKNOWN, memory_order_relaxed);
}
