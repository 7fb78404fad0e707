/* ask.c - covey status, resize, leave: one question to a member of a running job.
 *
 * The job file names addresses and the secret. All addresses are dialed at once; whoever is first to prove that it
 * knows the secret is asked, and if it goes before it answers, the next one: how things stand may be asked twice, and
 * twice the same size is one resize. Not so a leave: ranks are numbered anew when one has left, so a leave that may
 * have been heard is not put again.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <uv.h>

#include "elastic/link.h"
#include "elastic/watch.h"
#include "tool.h"

enum { ALL_MS = 5000, LOOK_MS = 250 };

struct question {
    const char *what;
    const char *job_file;
    struct cv_ask ask;
    struct cv_birth found;
    struct cv_links *links;
    uv_loop_t loop;
    uv_timer_t timer;
    struct cv_id up[CV_MEMBERS_MAX]; /* members that can be asked */
    int up_count;
    struct cv_id asked; /* whom; none: nobody yet */
    bool done;
    int code;
    char why[200]; /* the last link went down */
    int looks;
};

static void end(struct question *question, int code) {
    if (question->done) return;
    question->done = true;
    question->code = code;
    uv_stop(&question->loop);
}

static void put(struct question *question) {
    for (int i = 0; i < question->up_count && cv_id_none(question->asked); i++)
        if (cv_links_send(question->links, question->up[i], CV_FRAME_ASK, &question->ask, sizeof question->ask)
            == COVEY_OK)
            question->asked = question->up[i];
}

static void forget(struct question *question, struct cv_id peer) {
    for (int i = 0; i < question->up_count; i++)
        if (cv_id_equal(question->up[i], peer)) question->up[i--] = question->up[--question->up_count];
}

static void on_up(void *user, const struct cv_roster_member *record, int role, uint64_t epoch) {
    struct question *question = user;
    (void) epoch;
    if (question->done || role != CV_ROLE_MEMBER) return; /* a joiner knows nothing */
    forget(question, record->id);
    if (question->up_count < CV_MEMBERS_MAX) question->up[question->up_count++] = record->id;
    put(question);
}

static void on_down(void *user, struct cv_id peer, int role, const char *why) {
    struct question *question = user;
    (void) role;
    snprintf(question->why, sizeof question->why, "%s", why ? why : "no reason given");
    forget(question, peer);
    if (question->done || cv_id_none(question->asked) || !cv_id_equal(peer, question->asked)) return;
    question->asked = (struct cv_id){{0}};
    if (question->ask.what != CV_ASK_LEAVE) {
        put(question);
        return;
    }
    say("the member that was asked went before it answered (%s); see with covey status --job %s whether it was done",
        question->why, question->job_file);
    end(question, CODE_NO_ANSWER);
}

/* First byte: '0' done, '1' refused; then text. */
static void on_frame(void *user, struct cv_id peer, int role, uint32_t type, const void *payload, size_t bytes) {
    struct question *question = user;
    const char *text = payload;
    (void) role;
    if (question->done || type != CV_FRAME_TELL || !cv_id_equal(peer, question->asked)) return;
    if (!bytes || (*text != '0' && *text != '1')) {
        say("the member that was asked answers in words of another version of covey");
        end(question, CODE_FAILED);
        return;
    }
    bool refused = *text == '1';
    int length = (int) strnlen(text + 1, bytes - 1);
    if (refused)
        say("%s: %.*s", question->what, length, text + 1);
    else
        printf("%.*s%s", length, text + 1, length && text[length] != '\n' ? "\n" : "");
    end(question, refused ? CODE_FAILED : 0);
}

/* ---- when nobody answers ---- */

static bool anybody_listens(const struct question *question) {
    for (uint32_t i = 0; i < question->found.member_count; i++)
        if (somebody_listens(question->found.members[i].address)) return true;
    return false;
}

static bool strangers(const struct question *question) {
    struct cv_links_count counts;
    cv_links_counts(question->links, &counts);
    return counts.bad_macs > 0;
}

static void explain(struct question *question) {
    const char *file = question->job_file, *why = question->why;
    if (!cv_id_none(question->asked))
        say("a member of the job was asked and did not answer within %d s; covey status may tell more", ALL_MS / 1000);
    else if (strangers(question))
        say("who listens at the addresses in %s does not know the secret of that job: the file is another job's; name "
            "the file of the running one",
            file);
    else if (anybody_listens(question))
        say("somebody listens at the addresses in %s, but nobody answered within %d s%s%s%s; the job may be starting, "
            "ending or standing still: try again",
            file, ALL_MS / 1000, *why ? " (" : "", why, *why ? ")" : "");
    else
        say("nobody listens at the addresses in %s (%s%s): the job has ended, and the file may be removed", file,
            question->found.members[0].address, question->found.member_count > 1 ? " and others" : "");
    end(question, CODE_NO_ANSWER);
}

/* What waiting will not mend is told at once. */
static void on_time(uv_timer_t *timer) {
    struct question *question = timer->data;
    bool nobody = cv_id_none(question->asked);
    bool hopeless = nobody && (strangers(question) || (question->looks == 1 && !anybody_listens(question)));
    if (++question->looks >= ALL_MS / LOOK_MS || hopeless) explain(question);
}

/* ---- asking ---- */

static void close_loop(struct question *question) {
    cv_links_close(&question->links);
    uv_close((uv_handle_t *) &question->timer, NULL);
    uv_run(&question->loop, UV_RUN_DEFAULT);
    uv_loop_close(&question->loop);
}

static bool open_links(struct question *question) {
    struct cv_links_setup setup = {.loop = &question->loop,
                                   .job = &question->found.job,
                                   .role = CV_ROLE_TOOL,
                                   .listener = -1,
                                   .events = {.user = question, .up = on_up, .down = on_down, .frame = on_frame}};
    if (cv_member_self(&setup.self) != COVEY_OK || cv_links_open(&question->links, &setup) != COVEY_OK) return false;
    for (uint32_t i = 0; i < question->found.member_count; i++)
        cv_links_want(question->links, (struct cv_id){{0}}, question->found.members[i].address);
    return true;
}

/* What links have to say about a try that fails is explained above. */
static void keep_silent(void *user, int32_t level, const char *topic, const char *text) {
    (void) level, (void) topic, (void) text, (void) user;
}

static int ask(struct question *question) {
    if (cv_rendezvous_read(question->job_file, &question->found) != COVEY_OK) {
        say("%s", cv_error_text());
        return CODE_NO_ANSWER;
    }
    if (!getenv("COVEY_LOG")) cv_log_set(keep_silent, NULL);
    uv_loop_init(&question->loop);
    uv_timer_init(&question->loop, &question->timer);
    question->timer.data = question;
    uv_timer_start(&question->timer, on_time, LOOK_MS, LOOK_MS);
    if (open_links(question)) {
        uv_run(&question->loop, UV_RUN_DEFAULT);
    } else {
        say("%s", cv_error_text());
        question->code = CODE_FAILED;
    }
    close_loop(question);
    return question->code;
}

static void print_ask_help(void) {
    printf("usage: covey status --job FILE          who is in the job, at which step, what it waits for\n"
           "       covey resize --job FILE N        let the job go on with N ranks: it grows through its covey run,\n"
           "                                        or its last ranks leave\n"
           "       covey leave --job FILE RANK      let one rank leave at the next commit; what it holds passes on\n"
           "\n"
           "FILE is the one that the job was given with --job (default: COVEY_JOB). The answer comes within %d s.\n"
           "Codes: 0 done, 1 refused, 2 wrong arguments, 3 nobody answered.\n",
           ALL_MS / 1000);
}

/* The number that goes with the question; status has none. */
static bool take_number(struct question *question, int argc, char **argv) {
    int64_t number = 0;
    bool status = !strcmp(question->what, "status"), resize = !strcmp(question->what, "resize");
    question->ask.what = status ? CV_ASK_STATUS : resize ? CV_ASK_RESIZE : CV_ASK_LEAVE;
    if (argc != !status) {
        say("usage: covey %s --job FILE%s", question->what, status ? "" : resize ? " N" : " RANK");
        return false;
    }
    if (!status && !parse_number(resize ? "resize" : "leave", argv[0], resize, CV_MEMBERS_MAX - !resize, &number))
        return false;
    question->ask.number = (int32_t) number;
    return true;
}

int ask_main(const char *what, int argc, char **argv) {
    static const struct option known[] = {
        {"job", required_argument, NULL, 'j'}, {"help", no_argument, NULL, 'h'}, {NULL, 0, NULL, 0}};
    static struct question question; /* large, and one a process */
    question.what = what;
    for (int option; (option = getopt_long(argc, argv, "h", known, NULL)) != -1;) {
        switch (option) {
        case 'j': question.job_file = optarg; break;
        case 'h': print_ask_help(); return 0;
        default: return CODE_USAGE;
        }
    }
    if (!question.job_file) question.job_file = cv_setting("COVEY_JOB");
    if (!*question.job_file) {
        say("%s: which job? name its file with --job FILE", what);
        return CODE_USAGE;
    }
    if (!take_number(&question, argc - optind, argv + optind)) return CODE_USAGE;
    int code = ask(&question);
    cv_job_forget(&question.found.job);
    return code;
}
