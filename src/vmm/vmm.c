#include "vmm/vmm.h"

#include <string.h>

#include "util/cleanup.h"
#include "util/errors.h"

/* In the order in which "auto" tries them. `found` caches a check() that succeeded, because it
 * starts programs and VMs are created all the time; a failure is asked anew, so that installing
 * what was missing helps at once. */
static struct vmm_backend {
    const struct vmm_ops *ops;
    char *found;
} vmm_backends[] = {
    {.ops = &qemu_ops},
};

#define VMM_BACKENDS (sizeof vmm_backends / sizeof *vmm_backends)

static int vmm_backend_check(struct vmm_backend *backend, char **ret_why) {
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

/* The first backend that works; if none does, what each of them said. */
static int vmm_find_any(const struct vmm_ops **ret_ops, char **ret_why) {
    cleanup_buf struct buf all = {0};
    for (size_t i = 0; i < VMM_BACKENDS; i++) {
        cleanup_free char *why = NULL;
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
                   i ? "; " : "no backend works here: ", vmm_backends[i].ops->name,
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
    buf_printf(&names,
               "there is no backend \"%s\" (-o backend=, or $VMSFS_BACKEND); known are: auto",
               name);
    for (size_t i = 0; i < VMM_BACKENDS; i++) {
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
