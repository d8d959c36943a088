#pragma once

#include <stdbool.h>
#include <stddef.h>

/* Intrusive, circular, doubly linked list. A link that is in no list points to itself, so that
 * removing it twice is harmless: what waits can always be taken out without knowing from where. */
struct list {
    struct list *prev, *next;
};

#define LIST_OWNER(link, type, member) ((type *)(void *)((char *)(link)-offsetof(type, member)))

static inline void list_init(struct list *l) {
    l->prev = l->next = l;
}

static inline bool list_is_empty(const struct list *l) {
    return l->next == l;
}

static inline void list_append(struct list *head, struct list *l) {
    l->prev = head->prev;
    l->next = head;
    head->prev->next = l;
    head->prev = l;
}

static inline void list_remove(struct list *l) {
    l->prev->next = l->next;
    l->next->prev = l->prev;
    list_init(l);
}

/* The first link, taken out; NULL when the list is empty. */
static inline struct list *list_pop(struct list *head) {
    struct list *l = head->next;
    if (l == head)
        return NULL;
    list_remove(l);
    return l;
}

/* Moves every link of `from` to the end of `to`. */
static inline void list_splice(struct list *to, struct list *from) {
    if (list_is_empty(from))
        return;
    from->next->prev = to->prev;
    to->prev->next = from->next;
    from->prev->next = to;
    to->prev = from->prev;
    list_init(from);
}
