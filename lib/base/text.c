/* text.c - a text that grows. */
#include "base/base.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/* Room for `more` characters and the terminator; false when there is no memory. */
static bool make_room(struct cv_text *text, size_t more) {
    size_t needed = text->length + more + 1;
    if (needed <= text->capacity) return true;
    size_t capacity = CV_MAX(needed, CV_MAX(text->capacity + text->capacity / 2, 256));
    char *data = realloc(text->data, capacity);
    if (!data) return false;
    text->data = data;
    text->capacity = capacity;
    return true;
}

void cv_text_print(struct cv_text *text, const char *format, ...) {
    va_list arguments, again;
    va_start(arguments, format);
    va_copy(again, arguments);
    int length = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    if (length >= 0 && make_room(text, (size_t) length)) {
        vsnprintf(text->data + text->length, (size_t) length + 1, format, again);
        text->length += (size_t) length;
    }
    va_end(again);
}

void cv_text_free(struct cv_text *text) {
    if (!text) return;
    free(text->data);
    *text = (struct cv_text){0};
}
