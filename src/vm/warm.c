#include "vm/warm.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"
#include "vm/boot.h"

/* A start from a template that has not come so far within half of boot_timeout, but at most this,
 * is given up. It takes a second or two, on a machine that is very busy ten. */
#define WARM_MOST_MS 20000

/* What could not be made, or was no good, is not made again for so long. */
#define WARM_RETRY_MS (10 * 60 * 1000)

#define WARM_PLANS_MOST 4 /* that wait to be made */

/* A VM that boots keeps a template from being made, whose guest would get no CPU beside it; but
 * what boots for longer than this most likely waits for something and needs none. */
#define WARM_BUSY_MS 15000

/* Where one VM after the other boots, a template is made after so long all the same. */
#define WARM_WAIT_MOST_MS 30000

/* A template from which the last start has failed, and may do so no more. */
struct warm_doubt {
    struct list link;
    char *template; /* owned; its folder */
};

struct warm {
    struct daemon *daemon;
    struct list doubts; /* of warm_doubt */
    struct list plans;  /* of warm_plan */
    unsigned count;
    struct warm_plan *plan;   /* what is being made; NULL: nothing */
    struct template template; /* its files, under another name */
    struct vmm_template *making;
    uv_work_t work; /* its end */
    int status;     /* of its end */
    struct template_key failed;
    uint64_t failed_at; /* uv_now(); 0: nothing has failed */
};

void warm_plan_free(struct warm_plan *plan) {
    if (!plan)
        return;
    template_key_free(&plan->key);
    free(plan->kernel);
    free(plan->initrd);
    free(plan->boot_args);
    free(plan->cpu_model);
    free(plan);
}

static void warm_plan_configure(const struct warm_plan *plan, struct vmm_config *ret_config) {
    *ret_config = (struct vmm_config){
        .id = "template",
        .kernel = plan->kernel,
        .initrd = plan->initrd,
        .boot_args = plan->boot_args,
        .vcpus = plan->vcpus,
        .memory = plan->memory,
        .cpu_model = plan->cpu_model,
    };
}

struct warm_plan *warm_plan_new(const struct vmm_ops *backend, const struct vmm_config *config,
                                const struct image *image) {
    struct warm_plan *plan = calloc(1, sizeof *plan);
    struct vmm_config made;
    if (!plan)
        return NULL;
    plan->backend = backend;
    plan->vcpus = config->vcpus;
    plan->memory = config->memory;
    plan->kernel = strdup(image->kernel);
    plan->initrd = strdup(image->initrd);
    plan->cpu_model = strdup(config->cpu_model ? config->cpu_model : "");
    plan->key.image_path = strdup(image->path);
    if (asprintf(&plan->boot_args, "%s%s%s", config->boot_args, image->warm_boot_args[0] ? " " : "",
                 image->warm_boot_args) < 0)
        plan->boot_args = NULL;
    bool ok =
        plan->kernel && plan->initrd && plan->cpu_model && plan->key.image_path && plan->boot_args;
    if (ok) {
        warm_plan_configure(plan, &made);
        ok = template_describe_file(plan->kernel, &plan->key.image) == 0 &&
             template_describe_file(plan->initrd, &plan->key.image) == 0 &&
             backend->templates->fingerprint(&made, &plan->key.machine) == 0 &&
             !plan->key.machine.failed;
    }
    if (ok)
        return plan;
    warm_plan_free(plan);
    return NULL;
}

/* ---- a VM that boots ---- */

void warm_forget(struct vm *vm) {
    warm_plan_free(vm->warm.plan);
    free(vm->warm.template);
    vm->warm.plan = NULL;
    vm->warm.template = NULL;
    vm->warm.overdue = false;
}

void warm_free_vm(struct vm *vm) {
    warm_forget(vm);
    free(vm->warm.bad_template);
}

void warm_begin_boot(struct vm *vm, char **ret_bad_template, bool *ret_cold) {
    *ret_bad_template = vm->warm.bad_template;
    *ret_cold = vm->warm.cold;
    vm->warm.bad_template = NULL;
    vm->warm.cold = false;
}

void warm_take_boot(struct vm *vm, struct vm_boot_result *result) {
    warm_forget(vm);
    vm->warm.plan = result->plan;
    result->plan = NULL;
    if (!result->template.dir)
        return;
    vm->warm.template = strdup(result->template.dir);
    vm_watch_boot(vm);
}

unsigned warm_time(const struct vm *vm) {
    unsigned half = vm->config.boot_timeout * 500;
    return !vm->warm.template ? 0 : half < WARM_MOST_MS ? half : WARM_MOST_MS;
}

void warm_overdue(uv_timer_t *timer) {
    struct vm *vm = timer->data;
    log_warn("%s: a guest that was started from a template has not answered for %u ms: it is ended",
             vm->id, warm_time(vm));
    vm->warm.overdue = true;
    vm->vmm->ops->kill(vm->vmm); /* warm_fall_back() follows */
}

static void warm_note_failure(struct warm *warm, const struct template_key *key) {
    template_key_free(&warm->failed);
    warm->failed_at = template_key_copy(&warm->failed, key) == 0 ? uv_now(warm->daemon->loop) : 0;
}

/* ---- doubts ---- */

static struct warm_doubt *warm_find_doubt(struct warm *warm, const char *template) {
    for (struct list *l = warm->doubts.next; l != &warm->doubts; l = l->next) {
        struct warm_doubt *doubt = LIST_OWNER(l, struct warm_doubt, link);
        if (strcmp(doubt->template, template) == 0)
            return doubt;
    }
    return NULL;
}

static void warm_free_doubt(struct warm_doubt *doubt) {
    list_remove(&doubt->link);
    free(doubt->template);
    free(doubt);
}

/* It has given a VM that runs, or it is another one. */
static void warm_trust(struct warm *warm, const char *template) {
    struct warm_doubt *doubt = template ? warm_find_doubt(warm, template) : NULL;
    if (doubt)
        warm_free_doubt(doubt);
}

/* Returns true if there was doubt already, and forgets it. */
static bool warm_doubt(struct warm *warm, const char *template) {
    struct warm_doubt *doubt = warm_find_doubt(warm, template);
    if (doubt) {
        warm_free_doubt(doubt);
        return true;
    }
    doubt = calloc(1, sizeof *doubt);
    if (!doubt || !(doubt->template = strdup(template))) {
        free(doubt);
        return false;
    }
    list_append(&warm->doubts, &doubt->link);
    return false;
}

/* What this end says of the template: NULL, nothing; else words. *ret_bad: that it has to go.
 * Nobody can tell a guest that does not come up because of its template from one that has no CPU,
 * so it takes two of them; and one that was not given the time to says nothing. */
static const char *warm_judge(struct vm *vm, enum vmm_end end, bool *ret_bad) {
    *ret_bad = end == VMM_REFUSED;
    if (end == VMM_REFUSED)
        return "; the template is no good, and is removed";
    if (end == VMM_HINDERED || (vm->warm.overdue && warm_time(vm) < WARM_MOST_MS))
        return "; that says nothing about the template, which stays";
    *ret_bad = warm_doubt(vm->daemon->warm, vm->warm.template);
    return *ret_bad ? ", as has the one before it: the template is removed"
                    : "; the template stays, unless the next start from it fails too";
}

bool warm_fall_back(struct vm *vm, enum vmm_end end, const char *why) {
    struct vm_warm *warm = &vm->warm;
    uint64_t started = vm->boot_started;
    bool bad;
    if (!warm->template || vm->gone || vm->state != VM_BOOTING)
        return false;
    const char *words = warm_judge(vm, end, &bad);
    log_warn("%s boots cold: its start from the template %s has failed (%s%s)%s", vm->id,
             warm->template, warm->overdue ? "no answer in time; " : "", why, words);
    if (bad) {
        if (warm->plan)
            warm_note_failure(vm->daemon->warm, &warm->plan->key);
        free(warm->bad_template);
        warm->bad_template = warm->template;
        warm->template = NULL;
    }
    warm_forget(vm);
    warm->cold = true;
    vm_disconnect(vm, -ERR_GONE, "the VM boots anew");
    if (vm_boot(vm) < 0)
        return false;
    vm->boot_started = started; /* boot_timeout is for both */
    vm_watch_boot(vm);
    return true;
}

/* ---- making templates ---- */

static bool warm_is_planned(const struct warm *warm, const struct template_key *key) {
    if (warm->plan && template_key_equals(&warm->plan->key, key))
        return true;
    for (struct list *l = warm->plans.next; l != &warm->plans; l = l->next)
        if (template_key_equals(&LIST_OWNER(l, struct warm_plan, link)->key, key))
            return true;
    return false;
}

static bool warm_has_failed(const struct warm *warm, const struct template_key *key) {
    return warm->failed_at && uv_now(warm->daemon->loop) - warm->failed_at < WARM_RETRY_MS &&
           template_key_equals(&warm->failed, key);
}

void warm_succeed(struct vm *vm) {
    struct warm *warm = vm->daemon->warm;
    struct warm_plan *plan = vm->warm.plan;
    vm->warm.plan = NULL;
    warm_trust(warm, vm->warm.template);
    if (!plan || vm->warm.template || warm->count == WARM_PLANS_MOST ||
        warm_is_planned(warm, &plan->key) || warm_has_failed(warm, &plan->key)) {
        warm_plan_free(plan);
        return;
    }
    plan->since = uv_now(warm->daemon->loop);
    list_append(&warm->plans, &plan->link);
    warm->count++;
}

static void warm_end_work(uv_work_t *work) {
    struct warm *warm = work->data;
    if (warm->status == 0)
        warm->status =
            template_finish(warm->daemon->settings.state_dir, &warm->template, &warm->plan->key);
    else
        warm->status = -ECANCELED; /* why has been said */
    if (warm->status < 0)
        template_remove(&warm->template);
}

static void warm_forget_making(struct warm *warm) {
    warm->work.data = NULL;
    if (warm->making)
        warm->plan->backend->templates->release(warm->making);
    warm->making = NULL;
    template_close(&warm->template);
    warm_plan_free(warm->plan);
    warm->plan = NULL;
}

/* What has begun to boot before it was there would have it made once more. */
static void warm_forget_plans(struct daemon *d, const struct template_key *key) {
    struct vm *vm;
    RB_FOREACH(vm, vm_index, &d->vms) {
        if (!vm->warm.plan || !template_key_equals(&vm->warm.plan->key, key))
            continue;
        warm_plan_free(vm->warm.plan);
        vm->warm.plan = NULL;
    }
}

static void warm_ended(uv_work_t *work, int canceled) {
    struct warm *warm = work->data;
    (void)canceled;
    if (warm->status == 0) {
        warm_forget_plans(warm->daemon, &warm->plan->key);
        warm_trust(warm, warm->template.dir);
        log_info("a template of %s is there: its next VMs start from it",
                 warm->plan->key.image_path);
    } else {
        if (warm->status != -ECANCELED)
            log_warn("a template of %s could not be kept, so its VMs boot cold: %s",
                     warm->plan->key.image_path, strerror(-warm->status));
        warm_note_failure(warm, &warm->plan->key);
    }
    warm_forget_making(warm);
}

static void warm_end(struct warm *warm, int status) {
    warm->status = status;
    warm->work.data = warm;
    uv_queue_work(warm->daemon->loop, &warm->work, warm_end_work, warm_ended);
}

static void warm_made(void *arg, int status, const char *why) {
    struct warm *warm = arg;
    if (status < 0)
        log_warn("no template of %s could be made, so its VMs boot cold: %s",
                 warm->plan->key.image_path, why);
    warm_end(warm, status);
}

static void warm_make(struct warm *warm, struct warm_plan *plan) {
    cleanup_free char *socket = NULL;
    struct vmm_config config;
    warm->plan = plan;
    int r = template_begin(warm->daemon->settings.state_dir, plan->memory, &warm->template);
    if (r == 0 && asprintf(&socket, "%s/template.qmp", warm->daemon->settings.runtime_dir) < 0)
        r = -ENOMEM;
    if (r == 0) {
        warm_plan_configure(plan, &config);
        config.dir = warm->template.dir;
        config.socket = socket;
        config.ram = warm->template.ram;
        config.device_state = warm->template.state;
        r = plan->backend->templates->make(warm->daemon->loop, &config, warm_made, warm,
                                           &warm->making);
    }
    if (r == 0) {
        log_info("making a template of %s", plan->key.image_path);
        return;
    }
    log_warn("no template of %s can be made, so its VMs boot cold: %s", plan->key.image_path,
             strerror(-r));
    if (warm->template.dir)
        template_remove(&warm->template);
    warm_note_failure(warm, &plan->key);
    warm_forget_making(warm);
}

static bool warm_is_busy(struct daemon *d, const struct warm_plan *plan) {
    uint64_t now = uv_now(d->loop);
    struct vm *vm;
    if (now - plan->since > WARM_WAIT_MOST_MS)
        return false;
    RB_FOREACH(vm, vm_index, &d->vms) {
        if (vm->state == VM_BOOTING && !vmm_is_for_existing(vm->config.backend) &&
            now - vm->boot_started < WARM_BUSY_MS)
            return true;
    }
    return false;
}

void warm_keep_house(struct daemon *d) {
    struct warm *warm = d->warm;
    if (warm->plan || list_is_empty(&warm->plans) || d->closing)
        return;
    struct warm_plan *plan = LIST_OWNER(warm->plans.next, struct warm_plan, link);
    if (warm_is_busy(d, plan))
        return;
    list_remove(&plan->link);
    warm->count--;
    warm_make(warm, plan);
}

int warm_open(struct daemon *d) {
    cleanup_free char *socket = NULL;
    d->warm = calloc(1, sizeof *d->warm);
    if (!d->warm)
        return -ENOMEM;
    d->warm->daemon = d;
    list_init(&d->warm->doubts);
    list_init(&d->warm->plans);
    templates_clear(d->settings.state_dir, vmm_end_strays);
    if (asprintf(&socket, "%s/template.qmp", d->settings.runtime_dir) >= 0)
        unlink(socket);
    return 0;
}

void warm_close(struct daemon *d) {
    struct warm *warm = d->warm;
    if (!warm)
        return;
    struct list *link;
    while ((link = list_pop(&warm->plans)))
        warm_plan_free(LIST_OWNER(link, struct warm_plan, link));
    if (!warm->making)
        return;
    warm->plan->backend->templates->release(warm->making);
    warm->making = NULL;
    if (!warm->work.data) { /* else it is being brought to its end */
        template_remove(&warm->template);
        warm_forget_making(warm);
    }
}

void warm_free(struct daemon *d) {
    if (d->warm) {
        template_key_free(&d->warm->failed);
        while (!list_is_empty(&d->warm->doubts))
            warm_free_doubt(LIST_OWNER(d->warm->doubts.next, struct warm_doubt, link));
    }
    free(d->warm);
    d->warm = NULL;
}
