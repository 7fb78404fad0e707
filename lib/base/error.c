/* error.c - the sentence of this thread's last failure. */
#include "base/base.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char sentence[CV_SENTENCE_MAX];

/* Sentences are built beside the old one and then copied: the arguments may point into it. */
covey_status cv_fail(covey_status status, const char *format, ...) {
    char text[CV_SENTENCE_MAX];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    memcpy(sentence, text, sizeof sentence);
    return status;
}

static void append(char text[CV_SENTENCE_MAX], const char *more) {
    size_t length = strlen(text);
    while (*more && length + 1 < CV_SENTENCE_MAX) text[length++] = *more++;
    text[length] = 0;
}

covey_status cv_fail_within(covey_status status, const char *format, ...) {
    char text[CV_SENTENCE_MAX];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    append(text, ": ");
    append(text, sentence);
    memcpy(sentence, text, sizeof sentence);
    return status;
}

const char *cv_error_text(void) { return sentence; }

const char *cv_status_name(covey_status status) {
    switch (status) {
    case COVEY_OK: return "COVEY_OK";
    case COVEY_IN_PROGRESS: return "COVEY_IN_PROGRESS";
    case COVEY_REDO: return "COVEY_REDO";
    case COVEY_REFUSED: return "COVEY_REFUSED";
    case COVEY_ERR_INVALID: return "COVEY_ERR_INVALID";
    case COVEY_ERR_NO_MEMORY: return "COVEY_ERR_NO_MEMORY";
    case COVEY_ERR_UNSUPPORTED: return "COVEY_ERR_UNSUPPORTED";
    case COVEY_ERR_TIMED_OUT: return "COVEY_ERR_TIMED_OUT";
    case COVEY_ERR_IO: return "COVEY_ERR_IO";
    case COVEY_ERR_MISMATCH: return "COVEY_ERR_MISMATCH";
    case COVEY_ERR_PEER_FAILED: return "COVEY_ERR_PEER_FAILED";
    case COVEY_ERR_BACKEND: return "COVEY_ERR_BACKEND";
    case COVEY_ERR_STATE: return "COVEY_ERR_STATE";
    case COVEY_LEFT: return "COVEY_LEFT";
    case COVEY_ERR_EXPELLED: return "COVEY_ERR_EXPELLED";
    case COVEY_ERR_STOPPED: return "COVEY_ERR_STOPPED";
    }
    return "an unknown status";
}
