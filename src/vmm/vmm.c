#include "vmm/vmm.h"

#include <pthread.h>
#include <string.h>

#include "util/cleanup.h"
#include "util/errors.h"

/* `found` caches a check() that succeeded, because it
 * starts programs and VMs are created all the time; a failure is asked anew, so that installing
 * what was missing helps at once. */
#define VMM_ROW(backend, tried) {.ops = &backend##_ops, .automatic = (tried)},
static struct vmm_backend {
    const struct vmm_ops *ops;
    bool automatic; /* "auto" tries it */
    char *found;
} vmm_backends[] = {VMM_BACKENDS(VMM_ROW)};
#undef VMM_ROW

#define VMM_COUNT (sizeof vmm_backends / sizeof *vmm_backends)

/* Boots look for their backend in the thread pool. */
static pthread_mutex_t vmm_mutex = PTHREAD_MUTEX_INITIALIZER;

static int vmm_backend_check_locked(struct vmm_backend *backend, char **ret_why) {
    if (backend->found) {
        *ret_why = strdup(backend->found);
        return *ret_why ? 0 : -ENOMEM;
    }
    cleanup_free char *why = NULL;
    int status = backend->ops->check(&why);
    if (status == 0 && why)
        backend->found = strdup(why);
    *ret_why = why;
    why = NULL;
    return status == 0 || status == -ENOMEM ? status : -ERR_UNSUPPORTED;
}

static int vmm_backend_check(struct vmm_backend *backend, char **ret_why) {
    pthread_mutex_lock(&vmm_mutex);
    int status = vmm_backend_check_locked(backend, ret_why);
    pthread_mutex_unlock(&vmm_mutex);
    return status;
}

#define VMM_NOT "not " /* before the name of one that was passed over, in a *ret_why */

size_t vmm_brief_length(const char *why) {
    const char *others = strstr(why, "; " VMM_NOT);
    return others ? (size_t)(others - why) : strlen(why);
}

/* The first backend that works; if none does, what each of them said. */
static int vmm_find_any(bool vsock, const struct vmm_ops **ret_ops, char **ret_why) {
    cleanup_buf struct buf others = {0};
    for (size_t i = 0; i < VMM_COUNT; i++) {
        cleanup_free char *why = NULL;
        if (!vmm_backends[i].automatic)
            continue;
        bool fits = vsock || !(vmm_backends[i].ops->traits & VMM_VSOCK);
        int status = fits ? vmm_backend_check(&vmm_backends[i], &why) : -ERR_UNSUPPORTED;
        if (status == -ENOMEM)
            return status;
        if (status == 0) {
            cleanup_buf struct buf chosen = {0};
            buf_printf(&chosen, "%s%s%s", why ? why : "", others.len ? "; " : "",
                       others.len ? others.data : "");
            *ret_ops = vmm_backends[i].ops;
            *ret_why = buf_steal(&chosen, NULL);
            return *ret_why ? 0 : -ENOMEM;
        }
        buf_printf(&others, "%s" VMM_NOT "%s: %s", others.len ? "; " : "",
                   vmm_backends[i].ops->name,
                   !fits ? "the image has no \"vsock\""
                   : why ? why
                         : error_text(status));
    }
    cleanup_buf struct buf all = {0};
    buf_printf(&all, "no backend works here: %s", others.data ? others.data : "");
    *ret_why = buf_steal(&all, NULL);
    return *ret_why ? -ERR_UNSUPPORTED : -ENOMEM;
}

int vmm_find(const char *name, bool vsock, const struct vmm_ops **ret_ops, char **ret_why) {
    *ret_why = NULL;
    if (strcmp(name, "auto") == 0)
        return vmm_find_any(vsock, ret_ops, ret_why);

    cleanup_buf struct buf names = {0};
    buf_printf(&names, "there is no backend \"%s\"; known are: auto", name);
    for (size_t i = 0; i < VMM_COUNT; i++) {
        if (strcmp(name, vmm_backends[i].ops->name) == 0) {
            int status = vmm_backend_check(&vmm_backends[i], ret_why);
            if (status == 0)
                *ret_ops = vmm_backends[i].ops;
            return status;
        }
        buf_printf(&names, " %s", vmm_backends[i].ops->name);
    }
    *ret_why = buf_steal(&names, NULL);
    return *ret_why ? -ERR_INVALID : -ENOMEM;
}

static bool is_given(const char *text) {
    return text && text[0];
}

int vmm_check_config(const struct vmm_ops *ops, const struct vmm_config *config, char **ret_why) {
    const struct {
        unsigned trait;
        bool wanted;
        const char *name;
    } settings[] = {
        {VMM_TAP, is_given(config->tap), "tap"},
        {VMM_JAIL, is_given(config->jail_user), "jail_user"},
        {VMM_CPU_MODEL, is_given(config->cpu_model), "cpu_model"},
    };
    cleanup_buf struct buf why = {0};
    *ret_why = NULL;
    if ((ops->traits & VMM_VSOCK) && !config->vsock_port)
        buf_printf(
            &why,
            "%s reaches guests by vsock, and the image.json of this image has no \"vsock\": "
            "build it anew with contrib/guest/tiny (vmsfs-guest-tiny), or use another backend",
            ops->name);
    for (size_t i = 0; i < sizeof settings / sizeof *settings && !why.len; i++)
        if (settings[i].wanted && !(ops->traits & settings[i].trait))
            buf_printf(&why, "config/%s is set, and the backend %s has no use for it: empty it",
                       settings[i].name, ops->name);
    if (!why.len && !why.failed)
        return 0;
    *ret_why = buf_steal(&why, NULL);
    return *ret_why ? -ERR_UNSUPPORTED : -ENOMEM;
}

unsigned vmm_end_strays(const char *dir) {
    unsigned count = 0;
    for (size_t i = 0; i < VMM_COUNT; i++)
        if (vmm_backends[i].ops->end_strays)
            count += vmm_backends[i].ops->end_strays(dir);
    return count;
}

const struct vmm_ops *vmm_named(const char *name) {
    for (size_t i = 0; i < VMM_COUNT; i++)
        if (strcmp(name, vmm_backends[i].ops->name) == 0)
            return vmm_backends[i].ops;
    return NULL;
}

bool vmm_is_for_existing(const char *name) {
    const struct vmm_ops *ops = vmm_named(name);
    return ops && ops->existing;
}
