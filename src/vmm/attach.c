/* An existing machine as a backend: nothing is started, and nothing is ended. An instance is the
 * knowledge of where the machine's SSH server is.
 *
 * A name may stand for several addresses, and for others tomorrow. The one in use is kept for as
 * long as it answers; then the next is offered, and behind the last the name is looked up anew. */
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "vmm/vmm.h"

#define ATTACH_LOOKUP_MS 1000 /* from a name that was not found to the next try */
#define ATTACH_ADDRESSES 16   /* of a name; more are not tried */

struct attach {
    struct vmm vmm;
    uv_loop_t *loop;
    struct vmm_events events;
    void *arg;
    char *host;      /* owned; name or address, as configured */
    char service[8]; /* the port, in digits */
    uv_getaddrinfo_t lookup;
    bool looking;     /* the lookup is with the thread pool */
    uv_timer_t timer; /* the next lookup, or the end */
    bool ready, ending, released;
    unsigned open; /* of the timer and the lookup: what still has to call back before it is freed */
    size_t count, current; /* of `found`; none: not known yet */
    struct vmm_endpoint found[ATTACH_ADDRESSES];
};

static struct attach *attach_of(const struct vmm *vmm) {
    return (struct attach *)(void *)vmm;
}

static void attach_unref(struct attach *a) {
    if (--a->open)
        return;
    free(a->host);
    free(a);
}

static void attach_on_timer_closed(uv_handle_t *handle) {
    attach_unref(handle->data);
}

static void attach_release(struct vmm *vmm) {
    struct attach *a = attach_of(vmm);
    a->released = true;
    if (a->looking)
        uv_cancel((uv_req_t *)&a->lookup); /* one that has begun goes on to its end, unheard */
    uv_close((uv_handle_t *)&a->timer, attach_on_timer_closed);
}

static void attach_look_up(uv_timer_t *timer);

static void attach_take(struct attach *a, const struct addrinfo *addresses) {
    a->count = a->current = 0;
    for (const struct addrinfo *info = addresses; info && a->count < ATTACH_ADDRESSES;
         info = info->ai_next) {
        struct vmm_endpoint *endpoint = &a->found[a->count++];
        *endpoint = (struct vmm_endpoint){.length = info->ai_addrlen};
        memcpy(&endpoint->address, info->ai_addr, info->ai_addrlen);
    }
}

static void attach_on_lookup(uv_getaddrinfo_t *lookup, int status, struct addrinfo *addresses) {
    struct attach *a = lookup->data;
    a->looking = false;
    if (!a->released && !a->ending) {
        if (status == 0) {
            attach_take(a, addresses);
        } else {
            cleanup_buf struct buf why = {0};
            buf_printf(&why, "the address of %s could not be found: %s", a->host,
                       uv_strerror(status));
            a->events.trouble(a->arg, why.failed ? "out of memory" : why.data);
        }
        if (a->count == 0) {
            uv_timer_start(&a->timer, attach_look_up, ATTACH_LOOKUP_MS, 0);
        } else if (!a->ready) {
            a->ready = true;
            a->events.ready(a->arg);
        }
    }
    uv_freeaddrinfo(addresses);
    attach_unref(a);
}

static void attach_look_up(uv_timer_t *timer) {
    struct attach *a = timer->data;
    static const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
    if (a->looking || a->ending)
        return;
    a->lookup.data = a;
    if (uv_getaddrinfo(a->loop, &a->lookup, attach_on_lookup, a->host, a->service, &hints) < 0) {
        uv_timer_start(&a->timer, attach_look_up, ATTACH_LOOKUP_MS, 0);
        return;
    }
    a->looking = true;
    a->open++;
}

static int attach_create(uv_loop_t *loop, const struct vmm_config *config,
                         const struct vmm_events *events, void *arg, struct vmm **ret_vmm) {
    struct attach *a = calloc(1, sizeof *a);
    char *host = strdup(config->address);
    if (!a || !host) {
        free(a);
        free(host);
        return -ENOMEM;
    }
    *a = (struct attach){
        .vmm.ops = &attach_ops,
        .loop = loop,
        .events = *events,
        .arg = arg,
        .host = host,
        .open = 1,
    };
    snprintf(a->service, sizeof a->service, "%u", config->port);
    uv_timer_init(loop, &a->timer);
    a->timer.data = a;
    attach_look_up(&a->timer);
    *ret_vmm = &a->vmm;
    return 0;
}

/* What save() has given says nothing that is not in the configuration. */
static int attach_adopt(uv_loop_t *loop, const struct vmm_config *config, const json_t *saved,
                        const struct vmm_events *events, void *arg, struct vmm **ret_vmm) {
    (void)saved;
    return attach_create(loop, config, events, arg, ret_vmm);
}

static json_t *attach_save(const struct vmm *vmm) {
    return attach_of(vmm)->ending ? NULL : json_object();
}

static void attach_on_end(uv_timer_t *timer) {
    struct attach *a = timer->data;
    a->events.exited(a->arg, VMM_POWERED_OFF, "it was detached", "");
}

static void attach_kill(struct vmm *vmm) {
    struct attach *a = attach_of(vmm);
    if (a->ending)
        return;
    a->ending = true;
    uv_timer_start(&a->timer, attach_on_end, 0, 0);
}

static void attach_stop(struct vmm *vmm, unsigned powerdown_ms, unsigned quit_ms) {
    (void)powerdown_ms, (void)quit_ms;
    attach_kill(vmm);
}

static bool attach_endpoint(const struct vmm *vmm, struct vmm_endpoint *ret_endpoint) {
    const struct attach *a = attach_of(vmm);
    if (a->count == 0)
        return false;
    *ret_endpoint = a->found[a->current];
    return true;
}

static void attach_no_answer(struct vmm *vmm) {
    struct attach *a = attach_of(vmm);
    if (a->count == 0 || ++a->current < a->count)
        return;
    a->current = 0;
    attach_look_up(&a->timer);
}

static void attach_describe(const struct vmm *vmm, json_t *info) {
    const struct attach *a = attach_of(vmm);
    struct vmm_endpoint endpoint;
    char host[NI_MAXHOST];
    if (!attach_endpoint(vmm, &endpoint) ||
        getnameinfo((const struct sockaddr *)&endpoint.address, endpoint.length, host, sizeof host,
                    NULL, 0, NI_NUMERICHOST) != 0)
        return;
    json_object_set_new(info, "address", json_string(host));
    json_object_set_new(info, "port", json_integer(atoi(a->service)));
}

static int attach_check(char **ret_why) {
    *ret_why = strdup("existing machines, reached by SSH");
    return *ret_why ? 0 : -ENOMEM;
}

const struct vmm_ops attach_ops = {
    .name = "attach",
    .existing = true,
    .check = attach_check,
    .create = attach_create,
    .adopt = attach_adopt,
    .save = attach_save,
    .stop = attach_stop,
    .kill = attach_kill,
    .endpoint = attach_endpoint,
    .no_answer = attach_no_answer,
    .describe = attach_describe,
    .release = attach_release,
};
