/* covey.c - the covey program: runs elastic jobs and asks running ones. */
#include <stdio.h>
#include <string.h>

#include "tool.h"

static void print_help(FILE *out) {
    fprintf(out,
            "usage: covey run [OPTION ...] -- PROGRAM [ARGUMENT ...]   run a program as a rank of an elastic job\n"
            "       covey run -n N [OPTION ...] -- PROGRAM ...         start such a job of N ranks\n"
            "       covey status --job FILE                            who is in the job, and how it stands\n"
            "       covey resize --job FILE N                          let the job go on with N ranks\n"
            "       covey leave --job FILE RANK                        let one rank leave in good order\n"
            "       covey version\n"
            "       covey run --help | status --help ...               more about each\n"
            "\n"
            "FILE is the one that the job was given with covey run --job FILE.\n");
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "run")) return run_main(argc - 1, argv + 1);
    if (!strcmp(what, "status") || !strcmp(what, "resize") || !strcmp(what, "leave"))
        return ask_main(what, argc - 1, argv + 1);
    if (!strcmp(what, "version") || !strcmp(what, "--version")) {
        printf("covey %d.%d.%d\n", COVEY_VERSION_MAJOR, COVEY_VERSION_MINOR, COVEY_VERSION_PATCH);
        return 0;
    }
    if (!strcmp(what, "--help") || !strcmp(what, "-h") || !strcmp(what, "help")) {
        print_help(stdout);
        return 0;
    }
    if (*what) say("there is no command '%s'", what);
    print_help(stderr);
    return CODE_USAGE;
}
