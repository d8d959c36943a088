#include <stdlib.h>
#include <string.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"
#include "vm/disk.h"
#include "vm/machine.h"
#include "vm/vm.h"

/* Changes of a VM's settings. They hold at once and are acknowledged when the record is on the
 * disk; if that fails they are taken back. */

struct vm_change {
    struct vm_wait save;
    struct vm *vm; /* a reference */
    const struct config_setting *setting;
    struct buf before, after; /* as text */
    struct list waits;        /* of vm_wait: who has asked, if he has not gone away */
};

static void change_free(struct vm_change *change) {
    vm_unref(change->vm);
    buf_free(&change->before);
    buf_free(&change->after);
    free(change);
}

static void change_take_back(struct vm_change *change, int status) {
    struct vm_config *config = &change->vm->config;
    cleanup_buf struct buf now = {0};
    cleanup_free char *why = NULL;
    config_print(config, change->setting, &now);
    /* Unless somebody else has changed it since. */
    if (now.len == change->after.len &&
        (!now.len || memcmp(now.data, change->after.data, now.len) == 0))
        config_set(config, change->setting->name, change->before.data ? change->before.data : "",
                   change->before.len, &why);
    vm_fail(change->vm, status,
            "config/%s: the change could not be written to the host's disk, and was taken back: %s",
            change->setting->name, error_text(status));
}

static void change_saved(struct vm_wait *wait, int status) {
    struct vm_change *change = LIST_OWNER(wait, struct vm_change, save);
    if (status < 0 && !change->vm->gone)
        change_take_back(change, status);
    vm_wait_wake(&change->waits, status);
    change_free(change);
}

static int vm_check_change(struct vm *vm, const struct config_setting *setting) {
    if ((setting->flags & CONFIG_LIVE) || vm->state == VM_STOPPED || vm->state == VM_FAILED)
        return 0;
    return vm_fail(
        vm, -ERR_BUSY,
        "config/%s can be changed while the VM is stopped, and %s is %s: `echo stopped > "
        "status` stops it",
        setting->name, vm->id, vm_state_name(vm->state));
}

/* Takes `config` over. */
static int vm_change(struct vm *vm, const struct config_setting *setting, struct vm_config *config,
                     struct vm_wait *wait) {
    struct vm_change *change = calloc(1, sizeof *change);
    if (!change)
        return -ERR_NO_MEMORY;
    change->save.done = change_saved;
    change->vm = vm_ref(vm);
    change->setting = setting;
    list_init(&change->waits);
    config_print(&vm->config, setting, &change->before);
    config_print(config, setting, &change->after);
    if (change->before.failed || change->after.failed) {
        change_free(change);
        return -ERR_NO_MEMORY;
    }
    struct vm_config before = vm->config;
    vm->config = *config;
    *config = before;
    machine_changed(vm, setting);
    clock_gettime(CLOCK_REALTIME, &vm->config_files[setting - config_settings].changed);
    if (wait)
        list_append(&change->waits, &wait->link);
    vm_save_for(vm, &change->save);
    return 0;
}

/* It quotes what was written. */
static int vm_refuse_value(struct vm *vm, const char *name, const char *where, const char *why) {
    struct buf text = {0};
    buf_printf(&text, "%s%s", where, why);
    log_warn("%s: config/%s: what was written is not accepted", vm->id, name);
    vm_set_error(vm, &text);
    return -ERR_INVALID;
}

int vm_configure(struct vm *vm, const char *name, const char *text, size_t length,
                 struct vm_wait *wait) {
    struct vm_config config;
    cleanup_free char *why = NULL;
    if (vm->gone)
        return -ERR_GONE;
    int r = config_copy(&config, &vm->config);
    if (r < 0)
        return r;
    r = config_set(&config, name, text, length, &why);
    if (r == 0)
        r = 1;
    else if (r > 0 && (r = vm_check_change(vm, config_find(name))) == 0)
        r = config.disk == vm->config.disk ? 0 : disk_check(vm, config.disk);
    else if (why)
        r = vm_refuse_value(vm, name, r == -ERR_NOT_FOUND ? "config: " : "config/", why);
    if (r == 0)
        r = vm_change(vm, config_find(name), &config, wait);
    config_free(&config);
    return r;
}
