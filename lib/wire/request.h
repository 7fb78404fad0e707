/* request.h - what a collective is made of: its messages, peer by peer. Private to the room; request.c moves them. */
#ifndef CV_REQUEST_H
#define CV_REQUEST_H

#include "wire/wire.h"

/* A message a request holds in its lane, or in a copy made before the request was begun. */
struct cv_held {
    const struct cv_frame *frame;
    const char *payload;
    struct cv_early *early; /* NULL: it lies in the lane, as */
    uint64_t number;        /* the number-th taken from it */
};

/* What a request exchanges with one peer: first messages, and results where the request is segmented. */
struct cv_request_part {
    const char *out;
    size_t out_bytes;
    char *in; /* NULL with in_bytes > 0: to be joined */
    size_t in_bytes;
    char *result_in;
    size_t result_bytes;
    size_t out_done, in_done; /* bytes of whole pieces sent and received */
    bool sent, received, holds, result_sent, result_received; /* sent, received: all pieces */
    struct cv_held held;
};

struct covey_request {
    struct cv_collectives *owner;
    struct cv_wire *wire;
    struct covey_request *next; /* in the order they were begun */
    struct covey_request *then; /* the next part of what the caller sees as one request */
    struct cv_frame frame, result_frame;
    size_t piece;               /* the most bytes of a first message */
    uint64_t remaining;         /* messages to send and to receive, and the join; 0: done */
    int first_due;              /* peers' first messages to come and, unless segmented, to go before the join */
    bool segmented, join_due;   /* all-reduce: */
    int32_t dtype, op;
    size_t count;               /* elements to join here */
    const char *src;            /* this rank's leaf */
    char *dst;
    struct cv_request_part parts[]; /* [size] */
};

struct cv_wire *cv_collectives_wire(struct cv_collectives *collectives);
/* A request with the next sequence number, whose caller fills in the parts and then begins it or nothing. */
covey_status cv_request_new(struct cv_collectives *collectives, int op, uint64_t shape, const char *what,
                            struct covey_request **out);
/* Sends what can be sent at once. On failure *out is freed and NULL. */
covey_status cv_request_begin(struct covey_request **out);
/* Forgets a request and its further parts. */
void cv_request_drop(struct covey_request **request);

#endif
