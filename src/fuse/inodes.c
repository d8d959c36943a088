#include "fuse/internal.h"

static int inode_compare(struct node *a, struct node *b) {
    return a->id < b->id ? -1 : a->id > b->id;
}
RB_GENERATE_STATIC(inode_index, node, by_id, inode_compare)

struct node *inode_find(struct fuse_channel *channel, fuse_ino_t id) {
    struct node key = {.id = id};
    return RB_FIND(inode_index, &channel->inodes, &key);
}

void inode_lookup(struct fuse_channel *channel, struct node *node) {
    if (!node->id) {
        node->id = node->parent ? ++channel->last_inode : FUSE_ROOT_ID;
        RB_INSERT(inode_index, &channel->inodes, node);
    }
    if (node->lookups++ > 0)
        node_unref(node); /* the lookups together hold one reference */
}

void inode_forget(struct fuse_channel *channel, struct node *node, uint64_t lookups) {
    if (node->lookups > lookups) {
        node->lookups -= lookups;
        return;
    }
    node->lookups = 0;
    RB_REMOVE(inode_index, &channel->inodes, node);
    node->id = 0;
    node_unref(node);
}

void inode_forget_all(struct fuse_channel *channel) {
    struct node *node;
    while ((node = RB_MIN(inode_index, &channel->inodes)))
        inode_forget(channel, node, node->lookups);
}

void node_to_entry(const struct node *node, struct fuse_entry_param *ret_entry) {
    struct node_stat stat;
    node->ops->stat(node, &stat);
    *ret_entry = (struct fuse_entry_param){
        .ino = node->id,
        .attr = stat.st,
        .attr_timeout = stat.attr_seconds,
        .entry_timeout = stat.entry_seconds,
    };
}
