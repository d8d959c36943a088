#include "vm/record.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/fs.h"
#include "util/log.h"
#include "vm/boot.h"
#include "vm/job.h"
#include "vm/machine.h"
#include "vm/orphans.h"
#include "vm/vars.h"
#include "vmm/vmm.h"

/* What a VM's record says, at the start of the daemon: the VM as it was, and the VMM that runs for
 * it taken over.
 *
 * What cannot be read is put aside and never written over, and what runs in its name is ended:
 * nobody knows any more what it was given, and a second one would run beside it. */

#define RECORD_LIMIT (32 << 20)

static const char *record_text(const json_t *record, const char *key) {
    return json_string_value(json_object_get(record, key));
}

static unsigned record_number(const json_t *record, const char *key) {
    json_int_t n = json_integer_value(json_object_get(record, key));
    return n < 0 || n > (1 << 20) ? 0 : (unsigned)n;
}

static void record_load_looks(struct vm *vm, const json_t *record) {
    const json_t *env = json_object_get(record, "env"), *file = json_object_get(record, "environ");
    const char *style = json_string_value(json_object_get(file, "style"));
    vm->environ_style = style && strcmp(style, "export") == 0 ? ENVIRON_EXPORT : ENVIRON_SET_A;
    vm->env_look.changed = *vars_changed(vm->vars);
    vm->environ_look.changed = *vars_written(vm->vars);
    look_load(&vm->env_look, env);
    look_load(&vm->environ_look, file);
    vars_set_changed(vm->vars, &vm->env_look.changed);
    vars_set_written(vm->vars, &vm->environ_look.changed);
}

bool record_lacks_resources(int status) {
    return status == -EMFILE || status == -ENFILE || status == -ENOMEM || status == -EAGAIN;
}

#define RECORD_ASIDE_MOST 1000

/* Another name for a file, which nothing has yet. -EEXIST: something has. */
static int record_name(const char *path, const char *name, bool move) {
    if (!move)
        return link(path, name) < 0 ? -errno : 0;
    if (renameat2(AT_FDCWD, path, AT_FDCWD, name, RENAME_NOREPLACE) == 0)
        return 0;
    if (errno != EINVAL) /* not every file system knows the flag */
        return -errno;
    if (access(name, F_OK) == 0)
        return -EEXIST;
    return rename(path, name) < 0 ? -errno : 0;
}

static bool record_is_same_file(const char *a, const char *b) {
    struct stat one, other;
    return stat(a, &one) == 0 && stat(b, &other) == 0 && one.st_ino == other.st_ino &&
           one.st_dev == other.st_dev;
}

/* Keeps what cannot be read under a name of its own, beside what was kept before; `move`: there
 * only. NULL: that failed. */
static char *record_put_aside(const char *path, bool move) {
    for (unsigned i = 0; i < RECORD_ASIDE_MOST; i++) {
        cleanup_buf struct buf name = {0};
        buf_printf(&name, "%s.unreadable", path);
        if (i)
            buf_printf(&name, ".%u", i);
        if (name.failed)
            return NULL;
        int r = record_name(path, name.data, move);
        if (r == 0 || (r == -EEXIST && !move && record_is_same_file(path, name.data)))
            return buf_steal(&name, NULL);
        if (r != -EEXIST)
            return NULL;
    }
    return NULL;
}

/* A part of the record is wrong: the rest holds, and the whole is kept. */
static void record_doubt(struct vm *vm, const char *what, const char *outcome) {
    cleanup_free char *path = NULL, *aside = NULL;
    if (asprintf(&path, "%s/vm.json", vm->dir) >= 0)
        aside = record_put_aside(path, false);
    cleanup_buf struct buf words = {0};
    if (vm->error.len) { /* of another part: without the newline */
        buf_append(&words, vm->error.data, vm->error.len - 1);
        buf_append_str(&words, "; ");
    }
    buf_printf(&words, "%s%s", what, outcome);
    vm_fail_quoting(vm, -ERR_INVALID, words.failed ? "" : words.data,
                    "%s: a part of its record is wrong%s%s: ", vm->id,
                    aside ? "; the record is kept as " : "", aside ? aside : "");
    vm->save_again = true; /* when it is known what runs */
}

static void record_configure(struct vm *vm, const json_t *saved) {
    cleanup_free char *why = NULL;
    int r = config_load(&vm->config, saved, &why);
    if (r >= 0 && !json_is_object(saved))
        record_doubt(vm, "its record has no configuration", "; everything is at its default");
    else if (r < 0)
        record_doubt(vm, why ? why : error_text(r), ", which it has now");
}

static void record_load_variables(struct vm *vm, const json_t *record) {
    const json_t *variables = json_object_get(record, "variables");
    int r = vars_load(vm->vars, variables, json_is_true(json_object_get(record, "owned")));
    int more = vars_load_more(vm->vars, record);
    if (r < 0 || more < 0 || !json_is_array(variables))
        record_doubt(vm, "some variables in its record cannot be read", " and are left out");
}

/* The defaults are the mount's options, but for what was written over them: where the record says
 * what the options were, those of today take their place. */
static void record_follow_options(struct vm *vm, const json_t *options) {
    struct vm_config before;
    cleanup_free char *why = NULL;
    if (config_init(&before) < 0)
        return;
    config_load(&before, options, &why);
    for (size_t i = 0; i < CONFIG_SETTINGS; i++) {
        const struct config_setting *setting = &config_settings[i];
        cleanup_buf struct buf was = {0}, is = {0}, now = {0};
        cleanup_free char *whynot = NULL;
        config_print(&before, setting, &was);
        config_print(&vm->config, setting, &is);
        config_print(&vm->daemon->settings.config, setting, &now);
        if (was.len == is.len && (!was.len || memcmp(was.data, is.data, was.len) == 0))
            config_set(&vm->config, setting->name, now.data ? now.data : "", now.len, &whynot);
    }
    config_free(&before);
}

static void record_take_prepared(struct vm *vm, const json_t *record) {
    const json_t *forward = json_object_get(record, "forward");
    const json_t *options = json_object_get(record, "options");
    if (json_is_string(forward))
        buf_append(&vm->forward, json_string_value(forward), json_string_length(forward));
    if (options)
        record_follow_options(vm, options);
}

/* `.pub` may have been lost; known_hosts has the same key. */
static int record_read_host_key(struct vm *vm) {
    static const char *const names[] = {"ssh_host_ed25519_key.pub", "known_hosts"};
    int r = -ERR_INVALID;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        cleanup_free char *path = NULL;
        if (asprintf(&path, "%s/%s", vm->dir, names[i]) < 0)
            return -ERR_NO_MEMORY;
        buf_clear(&vm->host_key);
        r = boot_read_public_key(path, &vm->host_key);
        if (r == 0 || record_lacks_resources(r))
            return r;
    }
    return r;
}

static int record_adopt_vmm(struct vm *vm, const struct vmm_ops *ops, const json_t *saved) {
    const struct vmm_config config = {
        .id = vm->id, .dir = vm->dir, .address = vm->config.address, .port = vm->config.port};
    int r = ops->existing ? 0 : record_read_host_key(vm);
    /* -ENOENT and the like are about our files: -ESRCH alone says that nothing runs. */
    return r < 0 ? r : ops->adopt(vm->daemon->loop, &config, saved, &vm_vmm_events, vm, &vm->vmm);
}

/* What runs can neither be taken over nor be left to run on unseen. */
static void record_give_up(struct vm *vm, const char *why) {
    unsigned ended = vmm_end_strays(vm->dir);
    vm->state = VM_FAILED;
    vm_fail(vm, -ERR_GONE, "%s could not be taken over (%s)%s; `echo running > status` starts it",
            vm->id, why, ended ? ", and what ran was ended" : "");
    vm->save_again = true;
}

/* It runs again, as it did. */
static void record_resume(struct vm *vm, const json_t *record, int state) {
    const struct vmm_ops *ops = vm->backend;
    if (record_text(record, "template"))
        vm->warm.template = strdup(record_text(record, "template"));
    vm->attached = json_is_true(json_object_get(record, "attached"));
    if (!ops->existing)
        vm->adopted_at = vars_generation(vm->vars) + 1;
    vm->running_since.tv_sec = json_integer_value(json_object_get(record, "running_since"));
    vm->boot_started = uv_now(vm->daemon->loop);
    orphans_load(vm->orphans);
    if (state == VM_STOPPING) {
        /* What was written since is in this record alone: the guest's file is no truth any more. */
        vm->state = VM_STOPPING;
        ops->stop(vm->vmm, vm->config.stop_timeout * 1000, VM_QUIT_MS);
        return;
    }
    vm->state = state == VM_PAUSED && ops->pause ? VM_PAUSED
                : vm->attached                   ? VM_UNREACHABLE
                                                 : VM_BOOTING;
    if (vm->state == VM_BOOTING) {
        vars_assume_injected(vm->vars);
        vm_watch_boot(vm);
    }
}

/* Takes over the VMM that runs for this VM, if it does. An error is one of resources. */
static int record_adopt(struct vm *vm, const json_t *record, int state, char **ret_why) {
    const char *backend = record_text(record, "backend");
    const json_t *saved = json_object_get(record, "vmm");
    const struct vmm_ops *ops = backend ? vmm_named(backend) : NULL, *found;
    if (!saved || !backend) {
        if (state == VM_RUNNING || state == VM_PAUSED || state == VM_UNREACHABLE)
            record_give_up(vm, "its record does not say what it runs in");
        return 0;
    }
    if (!ops) {
        record_give_up(vm, "this vmsfs does not have its backend");
        return 0;
    }
    int r = record_adopt_vmm(vm, ops, saved);
    if (record_lacks_resources(r)) {
        if (asprintf(ret_why,
                     "the VM %s runs and cannot be taken over: %s. Nothing was changed; raise the "
                     "limit (ulimit -n) and start again",
                     vm->id, strerror(-r)) < 0)
            *ret_why = NULL;
        return r;
    }
    vm->backend = ops;
    if (r == -ESRCH && state != VM_STOPPING) /* else it was to end, and has */
        vm_fail(vm, r,
                "%s ended while no daemon was there to see it; `echo running > status` starts it",
                vm->id);
    else if (r < 0 && r != -ESRCH)
        record_give_up(vm, strerror(-r));
    if (r < 0)
        return 0;
    vmm_find(backend, NULL, &found,
             &vm->backend_note); /* it runs, whatever that says: for `info` */
    record_resume(vm, record, state);
    return 0;
}

static int record_parse(const struct buf *text, json_t **ret_record, char **ret_why) {
    json_error_t error;
    if (!text->len)
        return error_explain(-ERR_INVALID, ret_why, "it is empty");
    json_t *record = json_loadb(text->data, text->len, 0, &error);
    if (!record)
        /* The parser's own words quote what is there: values. */
        return error_explain(-ERR_INVALID, ret_why, "it is no JSON, at line %d, column %d",
                             error.line, error.column);
    const json_t *version = json_object_get(record, "version");
    int r = 0;
    if (!json_is_integer(version))
        r = error_explain(-ERR_INVALID, ret_why, "it does not say its version");
    else if (json_integer_value(version) != RECORD_VERSION)
        r = error_explain(-ERR_INVALID, ret_why,
                          "it is of version %" JSON_INTEGER_FORMAT
                          ", for another vmsfs; this one knows %d",
                          json_integer_value(version), RECORD_VERSION);
    if (r < 0)
        json_decref(record);
    else
        *ret_record = record;
    return r;
}

static int record_read(const char *path, json_t **ret_record, char **ret_why) {
    cleanup_buf struct buf text = {0};
    int r = fs_read(path, RECORD_LIMIT, &text);
    fs_remove_leftovers(path);
    if (r == 0) {
        r = record_parse(&text, ret_record, ret_why);
    } else if (r != -ENOENT) {
        int refused = error_explain(-ERR_INVALID, ret_why, "%s: %s", path, strerror(-r));
        r = record_lacks_resources(r) ? r : refused;
    }
    if (text.data)
        explicit_bzero(text.data, text.len);
    return r;
}

/* A VM that is as the record says, but for what runs. */
static int record_take(struct daemon *d, const char *dir, const char *name, enum vm_role role,
                       const json_t *record, struct vm **ret_vm, char **ret_why) {
    const char *id = record_text(record, "id");
    json_int_t number = json_integer_value(json_object_get(record, "number"));
    if (!id || !vm_id_is_valid(id) || number <= 0 || number >= UINT32_MAX)
        return error_explain(-ERR_INVALID, ret_why, "it has no id or no number");
    /* What is prepared is renamed with its folder; its record follows. */
    if (name && role == VM_ORDINARY && strcmp(id, name) != 0)
        return error_explain(-ERR_INVALID, ret_why, "it is that of another VM, %s", id);
    struct vm *vm = vm_new(d, name ? name : id, (uint64_t)number, dir);
    if (!vm)
        return -ERR_NO_MEMORY;
    vm->role = role;
    if (record_text(record, "user"))
        vm->user = strdup(record_text(record, "user"));
    vm->booted_ms = record_number(record, "booted_ms");
    vm->created.tv_sec = json_integer_value(json_object_get(record, "created"));
    vm->made_from = (uint64_t)json_integer_value(json_object_get(record, "made_from"));
    vm->ephemeral = json_is_true(json_object_get(record, "ephemeral"));
    record_configure(vm, json_object_get(record, "config"));
    record_take_prepared(vm, record);
    vm_load_written(vm, json_object_get(record, "written"));
    machine_load(vm, record);
    vm_use(vm);
    record_load_variables(vm, record);
    record_load_looks(vm, record);
    jobs_load(vm->jobs, vm);
    *ret_vm = vm;
    return 0;
}

int vm_load(struct daemon *d, const char *dir, const char *name, enum vm_role role,
            struct vm **ret_vm, char **ret_why) {
    cleanup_free char *path = NULL;
    json_t *record = NULL;
    struct vm *vm = NULL;
    *ret_why = NULL;
    if (asprintf(&path, "%s/vm.json", dir) < 0)
        return -ERR_NO_MEMORY;
    int r = record_read(path, &record, ret_why);
    if (r == 0)
        r = record_take(d, dir, name, role, record, &vm, ret_why);
    if (r == 0) {
        const char *text = record_text(record, "state");
        int state = text ? vm_state_from_name(text, strlen(text)) : VM_STOPPED;
        vm->state = state == VM_FAILED ? VM_FAILED : VM_STOPPED;
        vm->recorded = state < 0 ? VM_STOPPED : (enum vm_state)state;
        vm->boot_again = state == VM_BOOTING && !json_object_get(record, "vmm");
        if (vm->boot_again && !vmm_is_for_existing(vm->config.backend))
            vmm_end_strays(vm->dir);
        r = record_adopt(vm, record, state, ret_why);
        if (!vm->vmm)
            vars_apply_promises(vm->vars);
        if (r < 0)
            vm_release(vm);
        else
            *ret_vm = vm;
        if (r == 0 && vm->save_again)
            vm_save(vm);
    }
    json_decref(record);
    return r;
}

struct vm *vm_load_unreadable(struct daemon *d, const char *dir, const char *name,
                              enum vm_role role, const char *why) {
    cleanup_free char *path = NULL, *aside = NULL;
    struct vm *vm = vm_new(d, name, 0, dir);
    if (!vm)
        return NULL;
    vm->role = role;
    vm->ephemeral = false; /* it was there before this mount */
    vm->state = VM_FAILED;
    unsigned ended = role == VM_ORDINARY ? vmm_end_strays(dir) : 0;
    if (asprintf(&path, "%s/vm.json", dir) >= 0)
        aside = record_put_aside(path, true);
    vm_fail(vm, -ERR_IO, "the record of %s could not be read (%s)%s%s%s: rmdir removes it%s", name,
            why ? why : "there is none", ended ? ", so what ran was ended" : "",
            aside ? "; it is kept in " : "", aside ? aside : "",
            role == VM_ORDINARY ? ", `echo running > status` starts it without its variables" : "");
    return vm;
}
