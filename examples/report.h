/* report.h - facts about the host, and a JSON file that is whole or not there. */
#ifndef REPORT_H
#define REPORT_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

/* The CPU, and the BLAS with its threads: with them change the bits of a matrix product. */
json_t *host_facts(void);

/* Takes report. True, or false and a sentence on stderr. */
bool write_report(const char *path, json_t *report);

#endif
