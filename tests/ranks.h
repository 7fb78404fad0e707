/* ranks.h - runs N ranks as threads of this process, for tests. Each gets its rank, the group to open with, and arg. */
#ifndef TEST_RANKS_H
#define TEST_RANKS_H

#include <pthread.h>
#include <stdlib.h>

#include <check.h>
#include <covey.h>

struct ranks_thread {
    pthread_t thread;
    int rank, size;
    covey_group *group;
    void *arg;
    void (*function)(int rank, int size, covey_group *group, void *arg);
};

static void *ranks_main(void *arg) {
    struct ranks_thread *self = arg;
    self->function(self->rank, self->size, self->group, self->arg);
    return NULL;
}

static inline void run_ranks(int size, void (*function)(int, int, covey_group *, void *), void *arg) {
    covey_group *group = NULL;
    ck_assert_int_eq(covey_group_create(size, &group), COVEY_OK);
    struct ranks_thread *threads = calloc((size_t) size, sizeof *threads);
    for (int rank = 0; rank < size; rank++) {
        threads[rank] =
            (struct ranks_thread){.rank = rank, .size = size, .group = group, .arg = arg, .function = function};
        ck_assert_int_eq(pthread_create(&threads[rank].thread, NULL, ranks_main, &threads[rank]), 0);
    }
    for (int rank = 0; rank < size; rank++) pthread_join(threads[rank].thread, NULL);
    free(threads);
    covey_group_free(&group);
}

#define ck_ok(expression)                                                                                   \
    do {                                                                                                    \
        covey_status ck_ok_status = (expression);                                                           \
        ck_assert_msg(ck_ok_status == COVEY_OK, "%s: %s: %s", #expression, covey_status_name(ck_ok_status), \
                      covey_last_error());                                                                  \
    } while (0)
#define ck_says(text) \
    ck_assert_msg(strstr(covey_last_error(), (text)) != NULL, "the sentence lacks '%s': %s", (text), covey_last_error())

#endif
