#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ssh/internal.h"
#include "util/errors.h"

#define POOL_MEMBERS 64     /* connections to one server */
#define POOL_CONNECTING 4   /* that are not up yet: dropbear allows 5 from one address */
#define POOL_RETRY 1000     /* ms after a refused connection, while others carry on */
#define POOL_PATIENCE 10000 /* ms for which no channel has found a place: then none waits on */
#define POOL_LIMIT_LIFE                                                                            \
    60000 /* ms for which a limit met by a session is believed: OpenSSH counts a                   \
             command that outlives its channel, so it may be less than the truth */

struct pool_member {
    struct list link; /* in pool.members */
    struct ssh_pool *pool;
    struct ssh_session *session;
    bool up;
    unsigned limit; /* channels that it has been seen to allow; until limit_until */
    uint64_t limit_until;
    uint64_t idle_since; /* 0: in use */
};

struct ssh_pool {
    uv_loop_t *loop;
    uv_timer_t timer;
    struct ssh_target target; /* its strings are ours */
    unsigned idle;
    struct list members;
    struct list channels; /* every channel of the pool that is not over */
    struct list waiting;  /* those that no session has, oldest first */
    bool fragile;         /* one channel a connection: see member_on_up() */
    uint64_t retry_at;    /* no new connection before, while others are up */
    uint64_t moved_at;    /* when a channel last got a session, or the oldest began to wait */
    bool closing;
};

static void pool_on_timer(uv_timer_t *timer);

#define MEMBER(l) LIST_OWNER(l, struct pool_member, link)

static void pool_schedule(struct ssh_pool *pool, uint64_t delay) {
    if (pool->closing)
        return;
    if (!uv_is_active((uv_handle_t *)&pool->timer) || uv_timer_get_due_in(&pool->timer) > delay)
        uv_timer_start(&pool->timer, pool_on_timer, delay, 0);
}

static bool pool_is_up(const struct ssh_pool *pool) {
    for (const struct list *l = pool->members.next; l != &pool->members; l = l->next)
        if (MEMBER(l)->up)
            return true;
    return false;
}

static unsigned pool_count_connecting(const struct ssh_pool *pool) {
    unsigned n = 0;
    for (const struct list *l = pool->members.next; l != &pool->members; l = l->next)
        n += !MEMBER(l)->up;
    return n;
}

static unsigned member_limit(const struct pool_member *member) {
    if (uv_now(member->pool->loop) < member->limit_until)
        return member->limit;
    return member->pool->fragile ? 1 : SESSION_CHANNELS;
}

static void member_remove(struct pool_member *member) {
    list_remove(&member->link);
    ssh_session_close(member->session);
    free(member);
}

/* `before`: a link of pool->waiting, or that itself for its end. */
static void pool_wait_before(struct ssh_pool *pool, struct list *before,
                             struct ssh_channel *channel) {
    channel->session = NULL;
    list_remove(&channel->link);
    if (list_is_empty(&pool->waiting))
        pool->moved_at = uv_now(pool->loop);
    list_append(before, &channel->link);
    pool_schedule(pool, 0);
}

static void pool_wait(struct ssh_pool *pool, struct ssh_channel *channel) {
    pool_wait_before(pool, &pool->waiting, channel);
}

/* One that had a session: it came before all that wait. */
static void pool_wait_again(struct ssh_pool *pool, struct ssh_channel *channel) {
    pool_wait_before(pool, pool->waiting.next, channel);
}

/* Dropbear from 2022.82 until 2025.87 closes a channel that has no command yet when the command of
 * another channel of the connection ends, and drops the whole connection when a command comes after
 * that (https://github.com/mkj/dropbear/issues/321). */
static bool member_is_fragile(const struct pool_member *member) {
    const char *banner = libssh2_session_banner_get(member->session->transport.ssh);
    const char *name = banner ? strstr(banner, "dropbear") : NULL;
    return name && (strncmp(name, "dropbear_", 9) != 0 || atoi(name + 9) < 2025);
}

static void member_on_up(void *arg) {
    struct pool_member *member = arg;
    struct ssh_pool *pool = member->pool;
    struct list *queued = &member->session->queued;
    member->up = true;
    pool->fragile = member_is_fragile(member);
    while (pool->fragile && !list_is_empty(queued) && queued->next != queued->prev)
        pool_wait_again(pool, LIST_OWNER(queued->prev, struct ssh_channel, link));
    pool_schedule(pool, 0);
}

static void member_on_down(void *arg, int status, const char *why) {
    struct pool_member *member = arg;
    struct ssh_pool *pool = member->pool;
    (void)status;
    (void)why;
    /* A server that refuses a further connection (MaxStartups) is not asked again at once. */
    if (!member->up)
        pool->retry_at = uv_now(pool->loop) + POOL_RETRY;
    member_remove(member);
    pool_schedule(pool, 0);
}

static int pool_connect(struct ssh_pool *pool, struct pool_member **ret_member) {
    static const struct ssh_session_events events = {.up = member_on_up, .down = member_on_down};
    struct pool_member *member = calloc(1, sizeof *member);
    if (!member)
        return -ENOMEM;
    member->pool = pool;
    int rc = ssh_session_open(pool->loop, &pool->target, &events, member, &member->session);
    if (rc < 0) {
        free(member);
        return rc;
    }
    member->session->member = member;
    list_append(&pool->members, &member->link);
    *ret_member = member;
    return 0;
}

/* The one with the fewest channels; one that is up before one that is still connecting. */
static struct pool_member *pool_choose(struct ssh_pool *pool) {
    struct pool_member *best = NULL;
    unsigned best_load = 0;
    for (struct list *l = pool->members.next; l != &pool->members; l = l->next) {
        struct pool_member *member = MEMBER(l);
        unsigned load = session_load(member->session);
        if (member->session->state == SESSION_DOWN || load >= member_limit(member))
            continue;
        if (!best || (member->up && !best->up) || (member->up == best->up && load < best_load)) {
            best = member;
            best_load = load;
        }
    }
    return best;
}

/* 1: given to a session, 0: it has to wait, -errno: there is no connection to be had. */
static int pool_assign(struct ssh_pool *pool, struct ssh_channel *channel) {
    struct pool_member *member = pool_choose(pool);
    if (!member) {
        unsigned count = ssh_pool_connections(pool);
        bool up = pool_is_up(pool);
        if (count >= POOL_MEMBERS || pool_count_connecting(pool) >= POOL_CONNECTING ||
            (up && uv_now(pool->loop) < pool->retry_at))
            return 0;
        int rc = pool_connect(pool, &member);
        if (rc < 0 && count == 0)
            return rc;
        if (rc < 0) {
            pool->retry_at = uv_now(pool->loop) + POOL_RETRY;
            return 0;
        }
    }
    member->idle_since = 0;
    pool->moved_at = uv_now(pool->loop);
    channel_attach(channel, member->session);
    return 1;
}

bool pool_takes_refused(struct ssh_channel *channel) {
    struct ssh_session *session = channel->session;
    struct pool_member *member = session->member;
    /* A fresh connection without a single channel: the server gives none at all. */
    if (!member || channel->pool->closing || !session->gave_channel)
        return false;
    unsigned open = session_load(session) - session_count_queued(session);
    /* 0: only commands that outlived their channels fill it; it is of no use until they end. */
    member->limit = open;
    member->limit_until = uv_now(member->pool->loop) + POOL_LIMIT_LIFE;
    while (!list_is_empty(&session->queued))
        pool_wait_again(member->pool, LIST_OWNER(session->queued.prev, struct ssh_channel, link));
    return true;
}

bool pool_takes_lost(struct ssh_channel *channel) {
    struct ssh_pool *pool = channel->pool;
    struct pool_member *member = channel->session->member;
    if (!member || pool->closing || member->up || !pool_is_up(pool))
        return false;
    pool_wait_again(pool, channel);
    return true;
}

void pool_has_room(struct pool_member *member) {
    pool_schedule(member->pool, 0);
}

/* Closes connections that have been idle; the first stays. Returns ms until the next, 0 for none.
 */
static uint64_t pool_close_idle(struct ssh_pool *pool) {
    uint64_t now = uv_now(pool->loop), next = 0;
    struct list *l = pool->members.next;
    while (l != &pool->members) {
        struct pool_member *member = MEMBER(l);
        l = l->next;
        bool full = member->up && member_limit(member) == 0;
        if (session_load(member->session) || !member->up) {
            member->idle_since = 0;
            continue;
        }
        if (full) {
            member_remove(member);
            continue;
        }
        if (!pool->idle || member->link.prev == &pool->members)
            continue;
        if (!member->idle_since)
            member->idle_since = now;
        uint64_t due = member->idle_since + pool->idle;
        if (due <= now)
            member_remove(member);
        else if (!next || due - now < next)
            next = due - now;
    }
    return next;
}

/* All places are taken by commands that go on and on. */
static void pool_give_up(struct ssh_pool *pool) {
    char why[200];
    snprintf(why, sizeof why,
             "the %u SSH connections to this VM have no place for another command%s, and none has "
             "come free for %d s: end some of those that run",
             ssh_pool_connections(pool), pool->fragile ? " (its server takes one on each)" : "",
             POOL_PATIENCE / 1000);
    while (!list_is_empty(&pool->waiting))
        channel_end(LIST_OWNER(pool->waiting.next, struct ssh_channel, link),
                    &(struct ssh_exit){.end = SSH_REFUSED, .error = -ERR_BUSY, .why = why});
}

static void pool_on_timer(uv_timer_t *timer) {
    struct ssh_pool *pool = timer->data;
    uint64_t next = pool_close_idle(pool);
    struct list *l;
    while (!pool->closing && !list_is_empty(&pool->waiting)) {
        l = pool->waiting.next;
        struct ssh_channel *channel = LIST_OWNER(l, struct ssh_channel, link);
        int rc = pool_assign(pool, channel);
        if (rc == 0)
            break;
        if (rc < 0)
            channel_end(channel, &(struct ssh_exit){.end = SSH_REFUSED,
                                                    .error = -ERR_UNREACHABLE,
                                                    .why = "no SSH connection could be made"});
    }
    if (!pool->closing && !list_is_empty(&pool->waiting) &&
        uv_now(pool->loop) - pool->moved_at >= POOL_PATIENCE)
        pool_give_up(pool);
    if (!list_is_empty(&pool->waiting) && (!next || next > POOL_RETRY))
        next = POOL_RETRY;
    if (next)
        pool_schedule(pool, next);
}

static void pool_free(struct ssh_pool *pool) {
    free((char *)pool->target.user);
    free((char *)pool->target.key_path);
    free((uint8_t *)pool->target.host_key);
    free(pool);
}

static void pool_on_closed(uv_handle_t *handle) {
    pool_free(handle->data);
}

int ssh_pool_new(uv_loop_t *loop, const struct ssh_target *target, unsigned idle,
                 struct ssh_pool **ret_pool) {
    struct ssh_pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return -ENOMEM;
    pool->loop = loop;
    pool->idle = idle;
    list_init(&pool->members);
    list_init(&pool->channels);
    list_init(&pool->waiting);
    pool->target = *target;
    pool->target.user = strdup(target->user);
    pool->target.key_path = strdup(target->key_path);
    uint8_t *host_key = malloc(target->host_key_length + 1);
    pool->target.host_key = host_key;
    if (!pool->target.user || !pool->target.key_path || !host_key) {
        pool_free(pool);
        return -ENOMEM;
    }
    memcpy(host_key, target->host_key, target->host_key_length);
    uv_timer_init(loop, &pool->timer);
    pool->timer.data = pool;
    *ret_pool = pool;
    return 0;
}

int ssh_pool_exec(struct ssh_pool *pool, const char *command,
                  const struct ssh_channel_events *events, void *arg,
                  struct ssh_channel **ret_channel) {
    if (pool->closing)
        return -ERR_UNREACHABLE;
    struct ssh_channel *channel;
    int rc = channel_new(command, events, arg, &channel);
    if (rc < 0)
        return rc;
    channel->pool = pool;
    list_append(&pool->channels, &channel->pool_link);
    /* Who came earlier goes first. */
    rc = list_is_empty(&pool->waiting) ? pool_assign(pool, channel) : 0;
    if (rc < 0) {
        channel_free(channel);
        return rc;
    }
    if (rc == 0)
        pool_wait(pool, channel);
    *ret_channel = channel;
    return 0;
}

void ssh_pool_hold(struct ssh_pool *pool, bool hold) {
    for (struct list *l = pool->members.next; l != &pool->members; l = l->next)
        ssh_session_hold(MEMBER(l)->session, hold);
}

void ssh_pool_close(struct ssh_pool *pool) {
    if (pool->closing)
        return;
    pool->closing = true;
    while (!list_is_empty(&pool->channels))
        channel_end(LIST_OWNER(pool->channels.next, struct ssh_channel, pool_link),
                    &(struct ssh_exit){.end = SSH_LOST,
                                       .error = -ERR_COMMAND_LOST,
                                       .why = "the connections to this VM were closed"});
    while (!list_is_empty(&pool->members))
        member_remove(MEMBER(pool->members.next));
    uv_close((uv_handle_t *)&pool->timer, pool_on_closed);
}

unsigned ssh_pool_connections(const struct ssh_pool *pool) {
    unsigned n = 0;
    for (const struct list *l = pool->members.next; l != &pool->members; l = l->next)
        n++;
    return n;
}

bool ssh_pool_is_exclusive(const struct ssh_pool *pool) {
    return pool->fragile;
}
