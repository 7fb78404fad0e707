/* report.h - facts about the host, and files that are whole or not there. */
#ifndef REPORT_H
#define REPORT_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

/* The CPU, and the BLAS with its threads: with them change the bits of a matrix product. */
json_t *host_facts(void);

/* Takes report. True, or false and a sentence on stderr. */
bool write_report(const char *path, json_t *report);
/* what: "the report"; text: NULL if there was no memory for it. */
bool write_text_file(const char *what, const char *path, const char *text);

#endif
