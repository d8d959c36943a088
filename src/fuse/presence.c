#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fuse/internal.h"
#include "util/cleanup.h"
#include "util/log.h"
#include "util/mounts.h"
#include "vm/daemon.h"

/* Notices that the mount is gone from the place where it was made.
 *
 * The kernel ends the connection with the last copy of the mount, and every mount namespace that
 * was made meanwhile has one: a container's, a service's, that of unshare(1). Whoever unmounts
 * means the daemon to end and to let go of its state directory, and knows nothing of those. So it
 * ends when no copy is left in its own namespace, and nothing is open anywhere; the copies
 * elsewhere answer ENOTCONN from then on. What is open is still served, as it is for an unmount
 * with -l.
 *
 * /proc/self/mountinfo is polled, which the kernel reports changes of as POLLPRI and POLLERR
 * (proc(5)). The mount itself is never touched. */

#define PRESENCE_FILE "/proc/self/mountinfo"
#define PRESENCE_SETTLE_MS 200 /* mounts change in crowds, and one may be on its way */
#define PRESENCE_OPEN_MS 1000  /* between looks at whether something is still open */

struct presence {
    struct fuse_channel *channel; /* the owner */
    char *path;                   /* of the mount, without links; owned */
    char *device;                 /* owned; NULL: not known */
    uv_poll_t changes;
    uv_timer_t timer;
    int fd;           /* of the poll; owned */
    unsigned handles; /* of libuv, that are open */
    bool found, missed;
};

static void presence_find(void *arg, const struct mounts_entry *entry) {
    struct presence *presence = arg;
    if (strcmp(entry->path, presence->path) != 0)
        return;
    free(presence->device); /* the last one is on top */
    presence->device = strcmp(entry->type, "fuse.vmsfs") == 0 ? strdup(entry->device) : NULL;
}

static void presence_look(void *arg, const struct mounts_entry *entry) {
    struct presence *presence = arg;
    presence->found |= strcmp(entry->device, presence->device) == 0;
}

/* False also where that cannot be known. */
static bool presence_is_gone(struct presence *presence) {
    presence->found = false;
    return mounts_each(PRESENCE_FILE, presence_look, presence) == 0 && !presence->found;
}

static void presence_on_timer(uv_timer_t *timer) {
    struct presence *presence = timer->data;
    struct fuse_channel *channel = presence->channel;
    if (!channel->mounted)
        return;
    if (!presence_is_gone(presence)) {
        presence->missed = false;
    } else if (!presence->missed) { /* a mount that was just moved may have been overlooked */
        presence->missed = true;
        uv_timer_start(timer, presence_on_timer, PRESENCE_SETTLE_MS, 0);
    } else if (!list_is_empty(&channel->handles) || !list_is_empty(&channel->dirs)) {
        uv_timer_start(timer, presence_on_timer, PRESENCE_OPEN_MS, 0);
    } else {
        log_info("%s is not mounted here any more: what copies of it there are in other mount "
                 "namespaces end with it",
                 presence->path);
        channel->left = true;
        fuse_channel_lost(channel);
    }
}

static void presence_on_change(uv_poll_t *poll, int status, int events) {
    struct presence *presence = poll->data;
    (void)events;
    if (status < 0)
        uv_poll_stop(poll);
    else if (!uv_is_active((uv_handle_t *)&presence->timer))
        uv_timer_start(&presence->timer, presence_on_timer, PRESENCE_SETTLE_MS, 0);
}

static void presence_free(struct presence *presence) {
    if (presence->fd >= 0)
        close(presence->fd);
    free(presence->path);
    free(presence->device);
    free(presence);
}

static void presence_on_closed(uv_handle_t *handle) {
    struct presence *presence = handle->data;
    if (--presence->handles == 0)
        presence_free(presence);
}

void presence_prepare(struct fuse_channel *channel, const char *mountpoint) {
    struct presence *presence = calloc(1, sizeof *presence);
    if (!presence)
        return;
    *presence = (struct presence){.channel = channel,
                                  .path = realpath(mountpoint, NULL),
                                  .fd = open(PRESENCE_FILE, O_RDONLY | O_CLOEXEC)};
    channel->presence = presence;
}

void presence_start(struct fuse_channel *channel) {
    struct presence *presence = channel->presence;
    if (!presence || presence->fd < 0 || !presence->path ||
        mounts_each(PRESENCE_FILE, presence_find, presence) < 0 || !presence->device ||
        uv_poll_init(channel->daemon->loop, &presence->changes, presence->fd) < 0) {
        log_debug("whether it is unmounted while there are copies of the mount is not watched");
        return;
    }
    presence->changes.data = presence;
    uv_timer_init(channel->daemon->loop, &presence->timer);
    presence->timer.data = presence;
    presence->handles = 2;
    uv_poll_start(&presence->changes, UV_PRIORITIZED, presence_on_change);
}

void presence_stop(struct fuse_channel *channel) {
    struct presence *presence = channel->presence;
    channel->presence = NULL;
    if (presence && presence->handles) {
        uv_close((uv_handle_t *)&presence->changes, presence_on_closed);
        uv_close((uv_handle_t *)&presence->timer, presence_on_closed);
    } else if (presence) {
        presence_free(presence);
    }
}
