/* message.c - membership messages as bytes: a fixed head and, where the kind has one, a roster as long as it is. */
#include "elastic/membership_inside.h"

static bool carries_roster(const struct cv_message *message) {
    return message->kind == CV_MSG_ACCEPT || message->kind == CV_MSG_INSTALL ||
           (message->kind == CV_MSG_STATE && message->accepted.epoch != 0);
}

size_t cv_message_bytes(const struct cv_message *message) {
    return offsetof(struct cv_message, roster) + (carries_roster(message) ? cv_roster_bytes(&message->roster) : 0);
}

/* What a receiver takes for granted about the numbers that go with a kind. */
static bool numbers_sound(const struct cv_message *message) {
    switch (message->kind) {
    case CV_MSG_PREPARE: case CV_MSG_REJECT: case CV_MSG_ACCEPTED:
        return message->ballot.epoch != 0 && message->ballot.proposer < CV_MEMBERS_MAX;
    case CV_MSG_STATE:
        return message->ballot.proposer < CV_MEMBERS_MAX && message->accepted.proposer < CV_MEMBERS_MAX &&
               (message->accepted.epoch == 0 || message->accepted.epoch == message->roster.epoch);
    case CV_MSG_ACCEPT:
        return message->ballot.proposer < CV_MEMBERS_MAX && message->ballot.epoch == message->roster.epoch;
    case CV_MSG_RESIZE:
        return message->number >= 1 && message->number <= CV_MEMBERS_MAX;
    case CV_MSG_STAMPED:
        return message->subject.word[0] != 0 && message->subject.word[1] != 0;
    case CV_MSG_ENTER:
        return !cv_id_none(message->member.id);
    case CV_MSG_DEAD: case CV_MSG_NEED:
        return !cv_id_none(message->subject);
    default:
        return true;
    }
}

bool cv_message_read(const void *data, size_t bytes, struct cv_message *out) {
    const size_t head = offsetof(struct cv_message, roster);
    if (bytes < head || bytes > sizeof *out) return false;
    memcpy(out, data, head);
    memset(&out->roster, 0, offsetof(struct cv_roster, members));
    if (out->kind < 1 || out->kind >= CV_MSG_KINDS || !memchr(out->member.address, 0, CV_ADDRESS_MAX)) return false;
    if (!carries_roster(out)) return bytes == head && numbers_sound(out);
    if (bytes < head + offsetof(struct cv_roster, members)) return false;
    memcpy(&out->roster, (const char *) data + head, bytes - head);
    return cv_roster_sound(&out->roster, bytes - head) && numbers_sound(out);
}
