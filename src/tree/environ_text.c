#include <stdlib.h>
#include <string.h>

#include "guest/dotenv.h"
#include "tree/environ.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "vm/vars.h"
#include "vm/vm.h"

/* The text of `environ`: what it says, and how it is printed. */

static void environ_change_free(struct var_change *change) {
    free((char *)(uintptr_t)change->name);
    explicit_bzero((char *)(uintptr_t)change->bytes, change->length);
    free((char *)(uintptr_t)change->bytes);
    *change = (struct var_change){0};
}

void environ_changes_free(struct environ_changes *all) {
    for (size_t i = 0; i < all->count; i++)
        environ_change_free(&all->changes[i]);
    free(all->changes);
}

/* The bytes of a variable that is set here read as any that a shell has written: with a newline. */
static int environ_add(void *arg, const struct env_var *var) {
    struct environ_changes *all = arg;
    if (all->count == all->cap) {
        size_t cap = all->cap ? all->cap * 2 : 32;
        struct var_change *changes = realloc(all->changes, cap * sizeof *changes);
        if (!changes)
            return -ERR_NO_MEMORY;
        all->changes = changes;
        all->cap = cap;
    }
    char *name = strndup(var->name, var->name_length), *bytes = malloc(var->length + 1);
    if (!name || !bytes) {
        free(name);
        free(bytes);
        return -ERR_NO_MEMORY;
    }
    if (var->length)
        memcpy(bytes, var->value, var->length);
    bytes[var->length] = '\n';
    all->changes[all->count++] =
        (struct var_change){.name = name, .bytes = bytes, .length = var->length + 1};
    return 0;
}

/* By name, and of one name in the order of the text: the pointers are into one array. */
static int environ_order(const void *a, const void *b) {
    struct var_change *const *x = a, *const *y = b;
    int order = strcmp((*x)->name, (*y)->name);
    return order ? order : *x < *y ? -1 : 1;
}

/* Of a name that comes twice the later counts. */
static int environ_keep_last(struct environ_changes *all) {
    cleanup_free struct var_change **sorted = calloc(all->count + 1, sizeof *sorted);
    if (!sorted)
        return -ERR_NO_MEMORY;
    for (size_t i = 0; i < all->count; i++)
        sorted[i] = &all->changes[i];
    qsort(sorted, all->count, sizeof *sorted, environ_order);
    for (size_t i = 1; i < all->count; i++)
        if (strcmp(sorted[i - 1]->name, sorted[i]->name) == 0)
            environ_change_free(sorted[i - 1]);
    size_t kept = 0;
    for (size_t i = 0; i < all->count; i++)
        if (all->changes[i].name)
            all->changes[kept++] = all->changes[i];
    all->count = kept;
    return 0;
}

/* What no variable can be. */
static int environ_check(struct vm *vm, const struct environ_changes *all) {
    for (size_t i = 0; i < all->count; i++) {
        const struct var_change *c = &all->changes[i];
        const struct var *var = vars_find(vm->vars, c->name);
        if (vm->guest->name_is_reserved(c->name) && !(var && var->set))
            return vars_refuse_reserved(vm, c->name);
        if (!var_fits(c->name, c->length, true))
            return vars_refuse_length(vm, c->name);
    }
    return 0;
}

int environ_parse(struct vm *vm, const char *text, size_t length, bool more_may_come,
                  struct environ_changes *ret_all, bool *ret_cut) {
    struct dotenv_error error = {0};
    *ret_cut = false;
    int r = dotenv_parse(text, length, environ_add, ret_all, &error);
    if (r == 0)
        r = environ_keep_last(ret_all);
    if (r == 0)
        return environ_check(vm, ret_all);
    if (r != -ERR_INVALID)
        return r;
    if (more_may_come && (error.incomplete || error.in_name)) {
        *ret_cut = true;
        return 0;
    }
    return vm_fail(vm, r, "environ, line %u: %s; nothing has been changed", error.line, error.text);
}

struct environ_printing {
    struct buf *out;
    const char *prefix; /* of each line */
};

static int environ_print_one(void *arg, const char *name, const char *bytes, size_t length) {
    struct environ_printing *printing = arg;
    struct env_var var = {name, strlen(name), bytes, var_value_length(bytes, length)};
    buf_append_str(printing->out, printing->prefix);
    dotenv_format(printing->out, &var, 1);
    return 0;
}

static void environ_print_as(struct vm *vm, enum environ_style style, struct buf *out) {
    bool wrapped = style == ENVIRON_SET_A && !RB_EMPTY(vars_index(vm->vars));
    struct environ_printing printing = {out, style == ENVIRON_EXPORT ? "export " : ""};
    if (wrapped)
        buf_append_str(out, DOTENV_BEGIN);
    vars_each(vm->vars, environ_print_one, &printing);
    if (wrapped)
        buf_append_str(out, DOTENV_END);
}

int environ_print(struct vm *vm, struct buf *out) {
    environ_print_as(vm, vm->environ_style, out);
    return out->failed ? -ERR_NO_MEMORY : 0;
}

void environ_note_style(struct vm *vm, const struct buf *text) {
    cleanup_buf struct buf printed = {0};
    environ_print_as(vm, ENVIRON_EXPORT, &printed);
    bool same = text->len > 0 && !printed.failed && printed.len == text->len &&
                memcmp(printed.data, text->data, printed.len) == 0;
    enum environ_style style = same ? ENVIRON_EXPORT : ENVIRON_SET_A;
    if (vm->environ_style == style)
        return;
    vm->environ_style = style;
    vm_save_soon(vm);
}
