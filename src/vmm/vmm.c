#include "vmm/vmm.h"

#include <pthread.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "util/cleanup.h"
#include "util/errors.h"

/* `found` caches a check() that succeeded, because it starts programs and VMs are created all the
 * time, for as long as the program is the one that was looked at; a failure is asked anew, so that
 * installing what was missing helps at once. Only a program that does not answer is left alone for
 * a while, since everybody would wait for it again. */
#define VMM_SILENT_S 60
#define VMM_ROW(backend, tried) {.ops = &backend##_ops, .automatic = (tried)},
static struct vmm_backend {
    const struct vmm_ops *ops;
    bool automatic;    /* "auto" tries it */
    char *found;       /* NULL: nothing is cached */
    time_t silent;     /* when the program did not answer; 0: it does */
    char *program;     /* path; NULL: there is none */
    struct stat looks; /* of the program */
} vmm_backends[] = {VMM_BACKENDS(VMM_ROW)};
#undef VMM_ROW

#define VMM_COUNT (sizeof vmm_backends / sizeof *vmm_backends)

/* Boots look for their backend in the thread pool. */
static pthread_mutex_t vmm_mutex = PTHREAD_MUTEX_INITIALIZER;

static bool vmm_program_is_same(const struct vmm_backend *backend, const char *program,
                                const struct stat *looks) {
    const struct stat *was = &backend->looks;
    if (!program || !backend->program)
        return !program && !backend->program;
    return strcmp(program, backend->program) == 0 && looks->st_dev == was->st_dev &&
           looks->st_ino == was->st_ino && looks->st_size == was->st_size &&
           looks->st_mtim.tv_sec == was->st_mtim.tv_sec &&
           looks->st_mtim.tv_nsec == was->st_mtim.tv_nsec;
}

static int vmm_backend_check_locked(struct vmm_backend *backend, char **ret_why) {
    cleanup_free char *program = NULL, *why = NULL;
    struct stat looks = {0};
    if (backend->ops->find_program && backend->ops->find_program(&program) == 0 &&
        stat(program, &looks) < 0)
        looks = (struct stat){0};
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (backend->found && vmm_program_is_same(backend, program, &looks) &&
        (!backend->silent || now.tv_sec - backend->silent < VMM_SILENT_S)) {
        *ret_why = strdup(backend->found);
        return !*ret_why ? -ENOMEM : backend->silent ? -ERR_UNSUPPORTED : 0;
    }
    free(backend->found);
    free(backend->program);
    backend->found = backend->program = NULL;
    int status = backend->ops->check(&why);
    backend->silent = status == -ERR_TIMED_OUT ? now.tv_sec : 0;
    if ((status == 0 || backend->silent) && why) {
        backend->found = strdup(why);
        backend->program = program;
        backend->looks = looks;
        program = NULL;
    }
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

void vmm_add_misfit(struct buf *out, const char *words) {
    buf_printf(out, "%s%s", out->len ? ", " : "", words);
}

static bool is_given(const char *text) {
    return text && text[0];
}

/* What of this the backend cannot do. */
static void vmm_add_misfits(const struct vmm_ops *ops, const struct vmm_config *config,
                            struct buf *out) {
    const struct {
        unsigned trait;
        const char *value, *words;
    } settings[] = {
        {VMM_TAP, config->tap, "it has no use for config/tap (empty it)"},
        {VMM_JAIL, config->jail_user, "it has no use for config/jail_user (empty it)"},
        {VMM_CPU_MODEL, config->cpu_model, "it has no use for config/cpu_model (empty it)"},
    };
    if ((ops->traits & VMM_VSOCK) && !config->vsock_port)
        vmm_add_misfit(out, "the image has no \"vsock\" in its image.json, by which it reaches "
                            "guests (build it anew with contrib/guest/tiny, vmsfs-guest-tiny)");
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        if (is_given(settings[i].value) && !(ops->traits & settings[i].trait))
            vmm_add_misfit(out, settings[i].words);
    if (ops->add_misfits)
        ops->add_misfits(config, out);
}

/* Can it boot this (NULL: whatever it is)? If not, *ret_why says what it cannot do. */
static int vmm_check_config(const struct vmm_ops *ops, const struct vmm_config *config,
                            char **ret_why) {
    cleanup_buf struct buf misfits = {0};
    if (config && !ops->existing)
        vmm_add_misfits(ops, config, &misfits);
    if (!misfits.len && !misfits.failed)
        return 0;
    *ret_why = buf_steal(&misfits, NULL);
    return *ret_why ? -ERR_UNSUPPORTED : -ENOMEM;
}

/* The first backend that works and can boot this; if none does, what each of them said. */
static int vmm_find_any(const struct vmm_config *config, const struct vmm_ops **ret_ops,
                        char **ret_why) {
    cleanup_buf struct buf others = {0};
    for (size_t i = 0; i < VMM_COUNT; i++) {
        cleanup_free char *found = NULL, *why = NULL;
        if (!vmm_backends[i].automatic)
            continue;
        int status = vmm_backend_check(&vmm_backends[i], &found);
        if (status == 0)
            status = vmm_check_config(vmm_backends[i].ops, config, &why);
        if (status == -ENOMEM)
            return status;
        if (status == 0) {
            cleanup_buf struct buf chosen = {0};
            buf_printf(&chosen, "%s%s%s", found ? found : "", others.len ? "; " : "",
                       others.len ? others.data : "");
            *ret_ops = vmm_backends[i].ops;
            *ret_why = buf_steal(&chosen, NULL);
            return *ret_why ? 0 : -ENOMEM;
        }
        buf_printf(&others, "%s" VMM_NOT "%s: %s", others.len ? "; " : "",
                   vmm_backends[i].ops->name,
                   why     ? why
                   : found ? found
                           : error_text(status));
    }
    return error_explain(-ERR_UNSUPPORTED, ret_why, "no backend %s: %s",
                         config ? "here can boot this" : "works here",
                         others.data ? others.data : "");
}

static int vmm_find_named(struct vmm_backend *backend, const struct vmm_config *config,
                          const struct vmm_ops **ret_ops, char **ret_why) {
    cleanup_free char *misfits = NULL;
    int status = vmm_backend_check(backend, ret_why);
    if (status < 0)
        return status;
    status = vmm_check_config(backend->ops, config, &misfits);
    if (status == 0) {
        *ret_ops = backend->ops;
        return 0;
    }
    free(*ret_why);
    return error_explain(status, ret_why, "%s cannot boot this: %s", backend->ops->name,
                         misfits ? misfits : error_text(status));
}

int vmm_find(const char *name, const struct vmm_config *config, const struct vmm_ops **ret_ops,
             char **ret_why) {
    *ret_why = NULL;
    if (strcmp(name, "auto") == 0)
        return vmm_find_any(config, ret_ops, ret_why);

    cleanup_buf struct buf names = {0};
    buf_printf(&names, "there is no backend \"%s\"; known are: auto", name);
    for (size_t i = 0; i < VMM_COUNT; i++) {
        if (strcmp(name, vmm_backends[i].ops->name) == 0)
            return vmm_find_named(&vmm_backends[i], config, ret_ops, ret_why);
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
