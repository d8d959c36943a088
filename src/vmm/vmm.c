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

/* The first backend that works; if none does, what each of them said. */
static int vmm_find_any(const struct vmm_ops **ret_ops, char **ret_why) {
    cleanup_buf struct buf all = {0};
    for (size_t i = 0; i < VMM_COUNT; i++) {
        cleanup_free char *why = NULL;
        if (!vmm_backends[i].automatic)
            continue;
        int status = vmm_backend_check(&vmm_backends[i], &why);
        if (status == -ENOMEM)
            return status;
        if (status == 0) {
            *ret_ops = vmm_backends[i].ops;
            *ret_why = why;
            why = NULL;
            return 0;
        }
        buf_printf(&all, "%s%s: %s",
                   all.len ? "; " : "no backend works here: ", vmm_backends[i].ops->name,
                   why ? why : error_text(status));
    }
    *ret_why = buf_steal(&all, NULL);
    return *ret_why ? -ERR_UNSUPPORTED : -ENOMEM;
}

int vmm_find(const char *name, const struct vmm_ops **ret_ops, char **ret_why) {
    *ret_why = NULL;
    if (strcmp(name, "auto") == 0)
        return vmm_find_any(ret_ops, ret_why);

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
