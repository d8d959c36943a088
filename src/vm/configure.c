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
    struct buf before, after; /* values */
    char *text;               /* the file's, before; or NULL */
    struct list waits;        /* of vm_wait: who has asked, if he has not gone away */
};

static void change_free(struct vm_change *change) {
    vm_unref(change->vm);
    buf_free(&change->before);
    buf_free(&change->after);
    free(change->text);
    free(change);
}

static struct vm_config_file *change_file(const struct vm_change *change) {
    return &change->vm->config_files[change->setting - config_settings];
}

static void change_take_back(struct vm_change *change, int status) {
    struct vm_config *config = &change->vm->config;
    cleanup_buf struct buf now = {0};
    cleanup_free char *why = NULL;
    config_print(config, change->setting, &now);
    /* Unless somebody else has changed it since. */
    if (now.len == change->after.len &&
        (!now.len || memcmp(now.data, change->after.data, now.len) == 0)) {
        struct vm_config_file *file = change_file(change);
        config_set(config, change->setting->name, change->before.data ? change->before.data : "",
                   change->before.len, &why);
        free(file->text);
        file->text = change->text;
        change->text = NULL;
    }
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

void vm_print_setting(const struct vm *vm, const struct config_setting *setting, struct buf *out) {
    const char *text = vm->config_files[setting - config_settings].text;
    if (text) {
        buf_append_str(out, text);
        return;
    }
    config_print(&vm->config, setting, out);
    if (out->len)
        buf_append_char(out, '\n');
}

/* How the file is to read from now on. True: otherwise than before. The caller frees *ret_before.
 */
static bool vm_note_written(struct vm *vm, const struct config_setting *setting, const char *text,
                            size_t length, char **ret_before) {
    struct vm_config_file *file = &vm->config_files[setting - config_settings];
    cleanup_buf struct buf before = {0}, after = {0};
    bool blank = true;
    vm_print_setting(vm, setting, &before);
    *ret_before = file->text;
    file->text = NULL;
    vm_print_setting(vm, setting, &after);
    for (size_t i = 0; i < length; i++)
        blank = blank && strchr(" \t\r\n", text[i]);
    /* Nothing stands for the default, which is what the file shows. */
    if (!blank && (after.len != length || memcmp(after.data, text, length) != 0)) {
        file->text = strndup(text, length);
        buf_clear(&after);
        buf_append(&after, text, length);
    }
    return before.len != after.len ||
           (before.len && memcmp(before.data, after.data, before.len) != 0);
}

json_t *vm_save_written(const struct vm *vm) {
    json_t *saved = json_object();
    for (size_t i = 0; i < CONFIG_SETTINGS; i++)
        if (vm->config_files[i].text)
            json_object_set_new(saved, config_settings[i].name,
                                json_string(vm->config_files[i].text));
    return saved;
}

void vm_load_written(struct vm *vm, const json_t *saved) {
    for (size_t i = 0; i < CONFIG_SETTINGS; i++) {
        const json_t *text = json_object_get(saved, config_settings[i].name);
        struct vm_config config;
        cleanup_free char *why = NULL, *before = NULL;
        if (!json_is_string(text) || config_copy(&config, &vm->config) < 0)
            continue;
        /* As long as it says the same as the value. */
        if (config_set(&config, config_settings[i].name, json_string_value(text),
                       json_string_length(text), &why) == 0)
            vm_note_written(vm, &config_settings[i], json_string_value(text),
                            json_string_length(text), &before);
        config_free(&config);
    }
}

/* The value that it has already, perhaps in other words. */
static void vm_reword(struct vm *vm, const struct config_setting *setting, const char *text,
                      size_t length) {
    cleanup_free char *before = NULL;
    if (!vm_note_written(vm, setting, text, length, &before))
        return;
    clock_gettime(CLOCK_REALTIME, &vm->config_files[setting - config_settings].changed);
    vm_save_soon(vm);
}

/* Takes `config` over, in which the setting is what `text` says. */
static int vm_change(struct vm *vm, const struct config_setting *setting, struct vm_config *config,
                     const char *text, size_t length, struct vm_wait *wait) {
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
    vm_note_written(vm, setting, text, length, &change->text);
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
    if (r == 0) {
        vm_reword(vm, config_find(name), text, length);
        r = 1;
    } else if (r > 0 && (r = vm_check_change(vm, config_find(name))) == 0)
        r = config.disk == vm->config.disk ? 0 : disk_check(vm, config.disk);
    else if (why)
        r = vm_refuse_value(vm, name, r == -ERR_NOT_FOUND ? "config: " : "config/", why);
    if (r == 0)
        r = vm_change(vm, config_find(name), &config, text, length, wait);
    config_free(&config);
    return r;
}
