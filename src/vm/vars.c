#include "vm/vars.h"

#include <stdlib.h>
#include <string.h>

#include "guest/env_file.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"
#include "vm/control.h"
#include "vm/scratch.h"
#include "vm/vars_internal.h"

static int var_compare(struct var *a, struct var *b) {
    return strcmp(a->name, b->name);
}
RB_GENERATE(var_index, var, entry, var_compare)

struct vars *vars_new(struct vm *vm) {
    struct vars *vars = calloc(1, sizeof *vars);
    if (!vars)
        return NULL;
    vars->poll = malloc(sizeof *vars->poll);
    if (!vars->poll) {
        free(vars);
        return NULL;
    }
    uv_timer_init(vm->daemon->loop, vars->poll);
    vars->poll->data = vars;
    vars->vm = vm;
    vars->last_number = VAR_FIRST_NUMBER;
    RB_INIT(&vars->index);
    list_init(&vars->promises);
    list_init(&vars->queued);
    list_init(&vars->refresh_waits);
    clock_gettime(CLOCK_REALTIME, &vars->changed);
    vars->written = vars->changed;
    return vars;
}

static void var_free(struct var *var) {
    free(var->name);
    if (var->bytes) /* values may be secrets: they do not stay behind in free memory */
        explicit_bzero(var->bytes, var->length);
    free(var->bytes);
    free(var);
}

static void vars_clear(struct vars *vars) {
    struct var *var;
    while ((var = RB_MIN(var_index, &vars->index))) {
        RB_REMOVE(var_index, &vars->index, var);
        var_free(var);
    }
}

void vars_shut(struct vars *vars) {
    vars_fail_all(vars, -ERR_GONE);
    vars_shut_promises(vars);
    uv_close((uv_handle_t *)vars->poll, (uv_close_cb)free);
    vars->poll = NULL;
}

void vars_free(struct vars *vars) {
    if (!vars)
        return;
    if (vars->poll)
        vars_shut(vars);
    vars_clear(vars);
    buf_free(&vars->kept);
    free(vars);
}

struct var_index *vars_index(struct vars *vars) {
    return &vars->index;
}

const struct timespec *vars_changed(const struct vars *vars) {
    return &vars->changed;
}

const struct timespec *vars_written(const struct vars *vars) {
    return &vars->written;
}

void vars_set_changed(struct vars *vars, const struct timespec *when) {
    vars->changed = *when;
}

void vars_set_written(struct vars *vars, const struct timespec *when) {
    vars->written = *when;
}

uint64_t vars_generation(const struct vars *vars) {
    return vars->generation;
}

struct var *vars_find(struct vars *vars, const char *name) {
    struct var key = {.name = (char *)(uintptr_t)name};
    return RB_FIND(var_index, &vars->index, &key);
}

/* What a file of env/ looks like that nobody has changed. */
static struct look vars_usual_look(const struct vars *vars) {
    struct look look = {.mode = 0600, .uid = vars->vm->daemon->uid, .gid = vars->vm->daemon->gid};
    clock_gettime(CLOCK_REALTIME, &look.changed);
    look.read = look.changed;
    return look;
}

static struct var *vars_add(struct vars *vars, const char *name) {
    struct var *var = calloc(1, sizeof *var);
    if (!var)
        return NULL;
    var->name = strdup(name);
    if (!var->name) {
        free(var);
        return NULL;
    }
    var->number = ++vars->last_number;
    var->look = vars_usual_look(vars);
    vars->changed = var->look.changed;
    RB_INSERT(var_index, &vars->index, var);
    return var;
}

/* A variable that is neither set nor being created has no place in the table. */
static void vars_drop_unused(struct vars *vars, struct var *var) {
    if (var->set || var->creating)
        return;
    RB_REMOVE(var_index, &vars->index, var);
    var_free(var);
    clock_gettime(CLOCK_REALTIME, &vars->changed);
}

struct var *vars_create(struct vars *vars, const char *name) {
    struct var *var = vars_find(vars, name);
    if (!var)
        var = vars_add(vars, name);
    if (var)
        var->creating++;
    return var;
}

void vars_move(struct vars *vars, const char *name, const char *new_name) {
    struct var *from = vars_find(vars, name), *to = vars_find(vars, new_name);
    if (to)
        to->creating = from ? from->creating : 0;
    vars_abandon(vars, name);
}

void vars_abandon(struct vars *vars, const char *name) {
    struct var *var = vars_find(vars, name);
    if (!var)
        return;
    var->creating = 0;
    var->truncated = 0;
    vars_drop_unused(vars, var);
}

void vars_uncreate(struct vars *vars, const char *name) {
    struct var *var = vars_find(vars, name);
    if (!var || !var->creating)
        return;
    var->creating--;
    vars_drop_unused(vars, var);
}

int vars_set(struct vars *vars, const char *name, const char *bytes, size_t length) {
    struct var *var = vars_find(vars, name);
    char *copy = malloc(length + 1);
    if (!var && copy)
        var = vars_add(vars, name);
    if (!var || !copy) {
        free(copy);
        return -ERR_NO_MEMORY;
    }
    if (length)
        memcpy(copy, bytes, length);
    copy[length] = '\0';
    if (var->set)
        vars->total -= strlen(name) + var->length;
    else
        clock_gettime(CLOCK_REALTIME, &vars->changed);
    free(var->bytes);
    var->bytes = copy;
    var->length = length;
    var->set = true;
    vars->total += strlen(name) + length;
    clock_gettime(CLOCK_REALTIME, &var->look.changed);
    vars->written = var->look.changed;
    var->generation = ++vars->generation;
    var->truncated = 0; /* what was truncated before has been written since */
    return 0;
}

void vars_unset(struct vars *vars, const char *name) {
    struct var *var = vars_find(vars, name);
    if (!var || !var->set)
        return;
    vars->total -= strlen(name) + var->length;
    free(var->bytes);
    var->bytes = NULL;
    var->length = 0;
    var->set = false;
    clock_gettime(CLOCK_REALTIME, &vars->written);
    var->generation = ++vars->generation;
    vars_drop_unused(vars, var);
}

size_t var_value_limit(const char *name) {
    return VAR_LIMIT - sizeof "=" - strlen(name); /* sizeof: with the NUL */
}

bool var_fits(const char *name, size_t length, bool newline) {
    return length <= var_value_limit(name) + (size_t)newline;
}

size_t var_value_length(const char *bytes, size_t length) {
    return length > 0 && bytes[length - 1] == '\n' ? length - 1 : length;
}

/* What the guest's file says, while it is being read. */
struct vars_reading {
    struct vars *vars;
    struct vars *seen; /* names only */
    bool merge;
    bool differs;
};

static int vars_read_one(void *arg, const struct env_var *line) {
    struct vars_reading *reading = arg;
    struct vars *vars = reading->vars;
    cleanup_free char *name = strndup(line->name, line->name_length);
    if (!name || vars_set(reading->seen, name, "", 0) < 0)
        return -ERR_NO_MEMORY;

    const struct var *var = vars_find(vars, name);
    if (reading->merge && var && var->set)
        return 0;
    if (var && var->set && var_value_length(var->bytes, var->length) == line->length &&
        memcmp(var->bytes, line->value, line->length) == 0)
        return 0; /* the bytes that were written are still right */

    cleanup_buf struct buf bytes = {0};
    buf_append(&bytes, line->value, line->length);
    buf_append_char(&bytes, '\n');
    if (bytes.failed)
        return -ERR_NO_MEMORY;
    reading->differs = true;
    return vars_set(vars, name, bytes.data, bytes.len);
}

struct vars_counting {
    size_t bytes, count;
};

static int vars_count_one(void *arg, const struct env_var *line) {
    struct vars_counting *counting = arg;
    counting->bytes += line->name_length + line->length;
    return ++counting->count > VARS_LEARN_COUNT || counting->bytes > VARS_LEARN_LIMIT
               ? -ERR_TOO_LARGE
               : 0;
}

/* What a guest may put into its file: anything. */
static int vars_check_text(struct vars *vars, const char *text, size_t length) {
    cleanup_buf struct buf kept = {0};
    struct vars_counting counting = {0};
    int r = length > GUEST_ENV_LIMIT
                ? -ERR_TOO_LARGE
                : env_file_parse(text, length, vars_count_one, &counting, &kept);
    if (r == -ERR_TOO_LARGE)
        vm_fail(vars->vm, r,
                "%s in the guest holds more than the %d bytes in %d variables that are read",
                vars->vm->config.env_file, VARS_LEARN_LIMIT, VARS_LEARN_COUNT);
    return r;
}

int vars_learn(struct vars *vars, const char *text, size_t length, bool merge) {
    int checked = vars_check_text(vars, text, length);
    if (checked < 0)
        return checked;
    struct vars *seen = calloc(1, sizeof *seen); /* only its index is used */
    struct vars_reading reading = {.vars = vars, .seen = seen, .merge = merge};
    cleanup_buf struct buf kept = {0};
    if (!seen)
        return -ERR_NO_MEMORY;
    seen->vm = vars->vm;
    int r = env_file_parse(text, length, vars_read_one, &reading, &kept);
    if (r == 0) {
        struct var *var, *next;
        for (var = merge ? NULL : RB_MIN(var_index, &vars->index); var; var = next) {
            next = RB_NEXT(var_index, &vars->index, var);
            if (var->set && !vars_find(seen, var->name)) {
                vars_unset(vars, var->name);
                reading.differs = true;
            }
        }
        buf_free(&vars->kept);
        vars->kept = kept;
        kept = (struct buf){0};
    }
    vars_clear(seen);
    free(seen);
    vars_project(vars);
    if (reading.differs && !vars->attached)
        vars->owned = true; /* somebody has changed them in the guest: that is to last, too */
    if (reading.differs)
        vm_save(vars->vm);
    return r;
}

static int vars_skip_one(void *arg, const struct env_var *line) {
    (void)arg;
    (void)line;
    return 0;
}

int vars_learn_kept(struct vars *vars, const char *text, size_t length) {
    struct buf kept = {0};
    int r = env_file_parse(text, length, vars_skip_one, NULL, &kept);
    buf_free(&vars->kept);
    vars->kept = kept;
    return r;
}

/* JSON strings are Unicode; what is no UTF-8 is recorded byte for byte as the characters U+0001 to
 * U+00FF. */
static json_t *vars_save_latin1(const char *bytes, size_t length) {
    cleanup_buf struct buf text = {0};
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)bytes[i];
        if (c >= 0x80)
            buf_append_char(&text, (char)(0xc0 | c >> 6));
        buf_append_char(&text, (char)(c >= 0x80 ? 0x80 | (c & 0x3f) : c));
    }
    return text.failed ? NULL : json_stringn(text.data ? text.data : "", text.len);
}

static int vars_load_latin1(struct buf *out, const char *text, size_t length) {
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c < 0x80) {
            buf_append_char(out, (char)c);
        } else if ((c == 0xc2 || c == 0xc3) && i + 1 < length) {
            buf_append_char(out, (char)((c & 3) << 6 | ((unsigned char)text[++i] & 0x3f)));
        } else {
            return -ERR_INVALID;
        }
    }
    return out->failed;
}

struct vars_saving {
    struct vars *vars;
    json_t *list;
    struct look usual;
};

json_t *vars_save_bytes(const char *name, const char *bytes, size_t length) {
    json_t *value = json_stringn(bytes, length);
    const char *key = value ? "bytes" : "latin1";
    if (!value)
        value = vars_save_latin1(bytes, length);
    return json_pack("{s:s, s:o}", "name", name, key, value);
}

static int vars_save_one(void *arg, const char *name, const char *bytes, size_t length) {
    struct vars_saving *saving = arg;
    const struct var *var = vars_find(saving->vars, name);
    json_t *one = vars_save_bytes(name, bytes, length);
    if (one && var) {
        json_object_set_new(one, "number", json_integer((json_int_t)var->number));
        look_save(&var->look, &saving->usual, one);
    }
    return json_array_append_new(saving->list, one) < 0 ? -ERR_NO_MEMORY : 0;
}

json_t *vars_save(const struct vars *vars) {
    json_t *list = json_array();
    struct vars_saving saving = {(struct vars *)(uintptr_t)vars, list, vars_usual_look(vars)};
    if (list && vars_walk(vars, vars_disk_batch(vars), vars_save_one, &saving) < 0) {
        json_decref(list);
        return NULL;
    }
    return list;
}

int vars_save_more(const struct vars *vars, json_t *record) {
    int r = vars_save_promises(vars, record);
    if (r == 0 && vars->kept.len) {
        json_t *kept = vars_save_latin1(vars->kept.data, vars->kept.len);
        r = json_object_set_new(record, "kept", kept) < 0 ? -ERR_NO_MEMORY : 0;
    }
    return r;
}

bool vars_are_owned(const struct vars *vars) {
    return vars->owned || vars_disk_batch(vars);
}

int vars_each(struct vars *vars,
              int (*visit)(void *arg, const char *name, const char *bytes, size_t length),
              void *arg) {
    struct var *var;
    int r = 0;
    RB_FOREACH(var, var_index, &vars->index) {
        bool empty = var->truncated || !var->set; /* as it reads */
        r = visit(arg, var->name, empty ? "" : var->bytes, empty ? 0 : var->length);
        if (r < 0)
            break;
    }
    return r;
}

static void vars_load_look(struct vars *vars, struct var *var, const json_t *one) {
    json_int_t number = json_integer_value(json_object_get(one, "number"));
    look_load(&var->look, one);
    if (number < VAR_FIRST_NUMBER || number > UINT32_MAX)
        return;
    var->number = (uint64_t)number;
    /* What is new gets another; scratch that was renamed has kept its own. */
    if (var->number >= SCRATCH_FIRST_NUMBER &&
        var->number - SCRATCH_FIRST_NUMBER > vars->vm->last_scratch)
        vars->vm->last_scratch = var->number - SCRATCH_FIRST_NUMBER;
    else if (var->number < SCRATCH_FIRST_NUMBER && var->number > vars->last_number)
        vars->last_number = var->number;
}

/* What vars_save_bytes() has made. */
int vars_load_bytes(const json_t *one, const char **ret_name, struct buf *value) {
    const json_t *name = json_object_get(one, "name");
    const json_t *bytes = json_object_get(one, "bytes");
    const json_t *latin1 = json_object_get(one, "latin1");
    if (!json_is_string(name) ||
        !env_name_is_valid(json_string_value(name), json_string_length(name)))
        return -ERR_INVALID;
    if (json_is_string(bytes))
        buf_append(value, json_string_value(bytes), json_string_length(bytes));
    else if (!json_is_string(latin1) ||
             vars_load_latin1(value, json_string_value(latin1), json_string_length(latin1)) < 0)
        return -ERR_INVALID;
    if (value->len && memchr(value->data, 0, value->len))
        return -ERR_INVALID;
    *ret_name = json_string_value(name);
    return value->failed;
}

static int vars_load_one(struct vars *vars, const json_t *one) {
    cleanup_buf struct buf value = {0};
    const char *name;
    int r = vars_load_bytes(one, &name, &value);
    if (r == 0)
        r = vars_set(vars, name, value.data ? value.data : "", value.len);
    if (r == 0)
        vars_load_look(vars, vars_find(vars, name), one);
    return r;
}

int vars_load_more(struct vars *vars, const json_t *record) {
    const json_t *kept = json_object_get(record, "kept");
    int r = vars_load_promises(vars, record);
    if (json_is_string(kept) &&
        vars_load_latin1(&vars->kept, json_string_value(kept), json_string_length(kept)) < 0) {
        buf_clear(&vars->kept);
        r = -ERR_INVALID;
    }
    return r;
}

int vars_load(struct vars *vars, const json_t *saved, bool owned) {
    size_t i;
    json_t *one;
    int r = 0;
    vars->owned = owned;
    json_array_foreach(saved, i, one) {
        int one_r = vars_load_one(vars, one);
        if (one_r < 0)
            r = one_r; /* the others are still wanted */
    }
    vars_project(vars);
    return r;
}

int vars_preset(struct vars *vars, const char *name, const char *bytes, size_t length) {
    const struct var *var = vars_find(vars, name);
    size_t was = var && var->set ? strlen(name) + var->length : 0;
    if (vars->vm->guest->name_is_reserved(name))
        return vars_refuse_reserved(vars->vm, name);
    if (!var_fits(name, var_value_length(bytes, length), false))
        return -ERR_TOO_LARGE;
    if (vars->total - was + strlen(name) + length > VARS_LIMIT)
        return -ERR_NO_ROOM;
    int r = vars_set(vars, name, bytes, length);
    if (r == 0) {
        vars->owned = true;
        vars_project(vars);
    }
    return r;
}

int vars_copy(struct vars *vars, struct vars *from) {
    struct var *var;
    int r = 0;
    RB_FOREACH(var, var_index, &from->index) {
        if (var->set && r == 0)
            r = vars_preset(vars, var->name, var->bytes, var->length);
    }
    return r;
}

void vars_describe(const struct vars *vars, json_t *info) {
    json_object_set_new(info, "variables", json_integer((json_int_t)vars_count(vars)));
    json_object_set_new(info, "env_commits", json_integer((json_int_t)vars->commits));
    json_object_set_new(info, "env_updates", json_integer((json_int_t)vars->updates));
}

size_t vars_count(const struct vars *vars) {
    struct var *var;
    size_t count = 0;
    struct var_index *index = (struct var_index *)(uintptr_t)&vars->index;
    RB_FOREACH(var, var_index, index) {
        count += var->set;
    }
    return count;
}
