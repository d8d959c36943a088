#pragma once

#include "util/list.h"
#include "vm/image.h"
#include "vm/template.h"
#include "vm/vm.h"
#include "vmm/vmm.h"

/* Warm boots: a VM starts from a template (vm/template.h) where there is one that fits, and else
 * boots cold as ever; the template is then made behind its back, by a machine of its own that no VM
 * knows of, at a time when nobody else wants the CPU.
 *
 * A start that comes to nothing is no failure of the VM: it boots cold. The template goes if that
 * speaks against it: QEMU does not take it, or its guest has failed twice with no VM of it that has
 * come up between. */

struct vm_boot_result;

/* All that it takes to make a template, and to know it again. */
struct warm_plan {
    struct list link; /* of those that wait to be made */
    uint64_t since;   /* uv_now(), from when on */
    const struct vmm_ops *backend;
    struct template_key key;
    char *kernel, *initrd, *boot_args, *cpu_model;
    unsigned vcpus, memory;
};

/* The plan for what `config` boots of this image. NULL: no memory, or the files cannot be read.
 * Blocks shortly: for the thread pool. */
struct warm_plan *warm_plan_new(const struct vmm_ops *backend, const struct vmm_config *config,
                                const struct image *image);
void warm_plan_free(struct warm_plan *plan); /* NULL is allowed */

/* A boot is about to be prepared: hands over the template that it has to remove (the caller frees
 * it; NULL: none), and whether it is to do without. */
void warm_begin_boot(struct vm *vm, char **ret_bad_template, bool *ret_cold);

/* The VMM of this boot is about to be created: takes over the plan and the name of the template. */
void warm_take_boot(struct vm *vm, struct vm_boot_result *result);

/* How long this boot may take before the template is given up, in ms. 0: it is no warm one. */
unsigned warm_time(const struct vm *vm);
void warm_overdue(uv_timer_t *timer);

/* The VM's start from a template has failed; `why` is a sentence. True: it boots cold now. False:
 * it was no such start, or that cannot be begun. */
bool warm_fall_back(struct vm *vm, enum vmm_end end, const char *why);

/* The VM runs: a template that was missing is to be made, and that of its own is a good one. */
void warm_succeed(struct vm *vm);

/* What the VM keeps for all this: of its last boot; and to the end. */
void warm_forget(struct vm *vm);
void warm_free_vm(struct vm *vm);

/* The daemon's side. */
int warm_open(struct daemon *d);
void warm_keep_house(struct daemon *d); /* every second */
void warm_close(struct daemon *d);      /* ends what is being made */
void warm_free(struct daemon *d);
