/*
Resizing and the data loader of a trainer. Resized images, random crops, the evaluation transform and repeated augmentation are compared with
what Pillow, torchvision and timm made of the same input (dev/reference/resize.py); batches of sets of images of mixed sizes with plain loops,
with any number of readers and ranks and with pieces so small that they wrap around.

    test_resize [-quick] [dev/reference/fixtures/resize.safetensors]
*/

#include <sys/wait.h>
#define TESTING
#include "../../train_deit.cu"
#include "check.cuh"

static char folder[] = "/tmp/test_resize.XXXXXX";

// Pillow's resize in plain loops over the whole image, in the order of its own source: horizontal, vertical
static void plain_pass(uint8_t* out, const uint8_t* in, int n, int full, size_t lines, size_t line_step, size_t step, size_t out_line_step, size_t out_step) {
    const double scale = (double)n / full, filter_scale = scale < 1.0 ? 1.0 : scale, support = 2.0 * filter_scale;
    double* w = (double*)malloc((n + 1) * sizeof(double));
    for (int x = 0; x < full; x++) {
        const double center = (x + 0.5) * scale;
        int low = (int)(center - support + 0.5), high = (int)(center + support + 0.5);
        if (low < 0) { low = 0; }
        if (high > n) { high = n; }
        double sum = 0.0;
        for (int k = low; k < high; k++) {
            const double d = fabs((k - center + 0.5) / filter_scale);
            w[k] = d < 1.0 ? (1.5 * d - 2.5) * d * d + 1.0 : d < 2.0 ? ((d - 5.0) * d + 8.0) * d * -0.5 + 2.0 : 0.0;
            sum += w[k];
        }
        for (size_t line = 0; line < lines; line++) {
            double value = 0.0;
            for (int k = low; k < high; k++) { value += w[k] / sum * in[line * line_step + k * step]; }
            value = floor(value + 0.5);
            out[line * out_line_step + x * out_step] = (uint8_t)(value < 0.0 ? 0.0 : value > 255.0 ? 255.0 : value);
        }
    }
    free(w);
}

static void plain_view(uint8_t* out, const uint8_t* image, int width, const ImageView* v, size_t S, size_t CH) {
    uint8_t* middle = (uint8_t*)malloc(v->y.n * v->x.full * CH);
    uint8_t* whole = (uint8_t*)malloc(v->y.full * v->x.full * CH);
    const size_t row = v->x.full * CH;
    for (size_t c = 0; c < CH; c++) {
        plain_pass(middle + c, image + ((size_t)v->y.begin * width + v->x.begin) * CH + c, v->x.n, (int)v->x.full, v->y.n, width * CH, CH, row, CH);
        for (size_t x = 0; x < v->x.full; x++) {
            plain_pass(whole + x * CH + c, middle + x * CH + c, v->y.n, (int)v->y.full, 1, 0, row, 0, row);
        }
    }
    for (size_t y = 0; y < S; y++) {
        for (size_t x = 0; x < S; x++) {
            memcpy(out + (y * S + x) * CH, whole + ((v->y.window + y) * v->x.full + v->x.window + (v->mirror ? S - 1 - x : x)) * CH, CH);
        }
    }
    free(middle);
    free(whole);
}

typedef struct {
    size_t pixels, equal;
    int largest; // difference
} Difference;

static void add_difference(Difference* d, const uint8_t* a, const uint8_t* b, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const int difference = abs((int)a[i] - (int)b[i]);
        d->equal += difference == 0;
        if (difference > d->largest) { d->largest = difference; }
    }
    d->pixels += n;
}

// all views of the fixture that have this S and CH, as one launch
static Difference run_views(const Safetensors* st, int S, int CH, bool plain) {
    Difference difference = {};
    static ResizeTask tasks[512];
    static ImageView views[512];
    const StTensor *out[512], *image[512];
    int n = 0, largest = 0;
    size_t bytes = 0;
    for (int i = 0; ; i++) {
        char name[32];
        snprintf(name, sizeof(name), "view.%d", i);
        const StTensor* t = safetensors_find(st, name);
        if (t == NULL) { break; }
        int p[11];
        memcpy(p, t->data, sizeof(p));
        snprintf(name, sizeof(name), "image.%d", p[0]);
        image[n] = safetensors_find(st, name);
        snprintf(name, sizeof(name), "out.%d", i);
        out[n] = safetensors_find(st, name);
        if (p[9] != S || (int)image[n]->shape[2] != CH) { continue; }
        views[n] = ImageView{{p[1], p[3], (size_t)p[5], (size_t)p[7]}, {p[2], p[4], (size_t)p[6], (size_t)p[8]}, p[10] == 1};
        tasks[n] = resize_task(&views[n], S, CH);
        tasks[n].image = n;
        tasks[n].staged = bytes;
        bytes += tasks[n].staged_bytes;
        tasks[n].resized = bytes;
        bytes += tasks[n].scratch_bytes;
        if (tasks[n].pitch > largest) { largest = tasks[n].pitch; }
        n++;
    }
    if (n == 0) { return difference; }
    const size_t pixels = numel(S, S, CH);
    uint8_t *staging, *images, *host = (uint8_t*)calloc(bytes, 1), *got = (uint8_t*)malloc(n * pixels);
    ResizeTask* device_tasks;
    cudaCheck(cudaMalloc(&staging, bytes));
    cudaCheck(cudaMalloc(&images, n * pixels));
    cudaCheck(cudaMalloc(&device_tasks, n * sizeof(ResizeTask)));
    for (int i = 0; i < n; i++) {
        const uint8_t* data = (const uint8_t*)image[i]->data;
        resize_stage(host + tasks[i].staged, &tasks[i], &views[i], data, (int)image[i]->shape[1], S, CH);
    }
    cudaCheck(cudaMemcpy(staging, host, bytes, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(device_tasks, tasks, n * sizeof(ResizeTask), cudaMemcpyHostToDevice));
    resize_images(images, staging, device_tasks, n, largest, S, CH, main_stream);
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaMemcpy(got, images, n * pixels, cudaMemcpyDeviceToHost));
    for (int i = 0; i < n; i++) {
        if (plain) { plain_view(host, (const uint8_t*)image[i]->data, (int)image[i]->shape[1], &views[i], S, CH); }
        const Difference before = difference;
        add_difference(&difference, got + i * pixels, plain ? host : (const uint8_t*)out[i]->data, pixels);
        if (!plain) {
            check(difference.equal - before.equal == pixels, "image %dx%d, box %d,%d %dx%d -> %zux%zu, window %zu,%zu of %d: %zu of %zu bytes equal Pillow's",
                  (int)image[i]->shape[0], (int)image[i]->shape[1], views[i].y.begin, views[i].x.begin, views[i].y.n, views[i].x.n, views[i].y.full,
                  views[i].x.full, views[i].y.window, views[i].x.window, S, difference.equal - before.equal, pixels);
        }
    }
    cudaCheck(cudaFree(staging));
    cudaCheck(cudaFree(images));
    cudaCheck(cudaFree(device_tasks));
    free(host);
    free(got);
    return difference;
}

static void test_views(const Safetensors* st) {
    Difference pillow = {}, plain = {};
    for (int S = 1; S < 80; S++) {
        for (int CH = 1; CH <= 4; CH++) {
            const Difference a = run_views(st, S, CH, false), b = run_views(st, S, CH, true);
            pillow = Difference{pillow.pixels + a.pixels, pillow.equal + a.equal, a.largest > pillow.largest ? a.largest : pillow.largest};
            plain = Difference{plain.pixels + b.pixels, plain.equal + b.equal, b.largest > plain.largest ? b.largest : plain.largest};
        }
    }
    printf("resize: %zu of %zu bytes equal Pillow's, largest difference %d; %zu equal plain loops in double, largest difference %d\n", pillow.equal,
           pillow.pixels, pillow.largest, plain.equal, plain.largest);
    check(pillow.pixels > 100000 && pillow.equal == pillow.pixels, "Pillow's bytes");
    check(plain.equal >= 0.999 * plain.pixels && plain.largest <= 1, "plain loops");
}

static void test_turn(void) {
    for (size_t rows = 1; rows < 30; rows++) {
        const size_t columns = 1 + rows * 7 % 41, stride = columns + rows % 3, pitch = 64;
        uint8_t in[64 * 64], out[64 * 64];
        for (size_t i = 0; i < sizeof(in); i++) { in[i] = (uint8_t)philox(3, 90, (unsigned)rows, i).x; }
        memset(out, 0, sizeof(out));
        turn_bytes(out, pitch, in, stride, rows, columns);
        bool equal = true;
        for (size_t x = 0; x < columns; x++) { for (size_t y = 0; y < rows; y++) { equal = equal && out[x * pitch + y] == in[y * stride + x]; } }
        check(equal, "turned %zu x %zu", rows, columns);
    }
}

static void test_choices(const Safetensors* st) {
    const StTensor* t = safetensors_find(st, "crops");
    for (size_t i = 0; i < t->shape[0]; i++) {
        int p[10];
        memcpy(p, (const char*)t->data + i * sizeof(p), sizeof(p));
        const ImageView v = random_crop(p[0], p[1], 32, p[2] / 1000.0, p[3], p[4], p[5]);
        check(v.y.begin == p[6] && v.x.begin == p[7] && v.y.n == p[8] && v.x.n == p[9], "crop %zu of %dx%d: %d,%d %dx%d, timm has %d,%d %dx%d", i, p[0], p[1], v.y.begin,
              v.x.begin, v.y.n, v.x.n, p[6], p[7], p[8], p[9]);
    }
    t = safetensors_find(st, "centers");
    for (size_t i = 0; i < t->shape[0]; i++) {
        int p[8];
        memcpy(p, (const char*)t->data + i * sizeof(p), sizeof(p));
        const ImageView v = center_crop(p[0], p[1], p[2], p[3] / 1000.0);
        check((int)v.y.full == p[4] && (int)v.x.full == p[5] && (int)v.y.window == p[6] && (int)v.x.window == p[7],
              "%dx%d to %d at %d: %zux%zu, window %zu,%zu; torchvision has %dx%d, %d,%d", p[0], p[1], p[2], p[3], v.y.full, v.x.full, v.y.window,
              v.x.window, p[4], p[5], p[6], p[7]);
    }
    int samplers = 0;
    Model* model = model_new();
    model->B = 7;
    for (const StTensor& tensor : st->tensors) {
        unsigned n, repeats, ranks, rank_, seed, epoch;
        if (sscanf(tensor.name, "sampler.%u.%u.%u.%u.%u.%u", &n, &repeats, &ranks, &rank_, &seed, &epoch) != 6) { continue; }
        const int* expected = (const int*)tensor.data;
        unsigned* order = (unsigned*)malloc(n * sizeof(unsigned));
        shuffle(order, n, seed, epoch);
        Loader loader = {};
        loader.model = model;
        loader.set.images = n;
        loader.order = order;
        loader.ranks = ranks;
        loader.rank = rank_;
        loader.repeats = repeats;
        loader.training = true;
        const size_t count = loader_epoch(&loader) / ranks, B = model->B;
        bool equal = count == tensor.shape[0];
        for (size_t k = 0; equal && k < count; k++) { equal = (int)loader_image(&loader, loader_place(&loader, k / B, k % B)) == expected[k]; }
        check(equal, "%s: %zu images, timm has %zu", tensor.name, count, tensor.shape[0]);
        free(order);
        samplers++;
    }
    check(samplers > 20, "%d samplers", samplers);
    free(model->images);
    model_free(model);
}

// writes a shard of n images, numbered from `begin` on; sides: least and most. Image i has label i % 10 and pixels of Philox(i)
static void write_shard(const char* path, unsigned begin, unsigned n, unsigned least, unsigned most, unsigned CH, unsigned classes) {
    ShardHeader h = {};
    memcpy(h.magic, "DROPIT\r\n", 8);
    h.version = 1;
    h.header_bytes = sizeof(h);
    h.images = n;
    h.classes = classes;
    h.channels = CH;
    for (int c = 0; c < 4; c++) { h.mean[c] = c < (int)CH ? 0.5f : 0.0f; h.std[c] = c < (int)CH ? 0.25f : 1.0f; }
    h.index_offset = sizeof(h);
    h.data_offset = sizeof(h) + n * sizeof(ShardEntry);
    ShardEntry* entries = (ShardEntry*)calloc(n, sizeof(ShardEntry));
    FILE* f = fopen(path, "wb");
    require(f != NULL, "cannot write %s: %m", path);
    uint64_t at = h.data_offset;
    fseek(f, (long)at, SEEK_SET);
    for (unsigned i = 0; i < n; i++) {
        const uint4 u = philox(1, 91, begin + i, 0);
        const unsigned height = least + u.x % (most - least + 1), width = least + u.y % (most - least + 1);
        const unsigned annotation = i % 3 * 40; // bytes that a classifier passes over
        const size_t bytes = numel(height, width, CH) + annotation;
        uint8_t* pixels = (uint8_t*)malloc(bytes);
        for (size_t j = 0; j < bytes; j++) { pixels[j] = (uint8_t)(128 + 100 * sin(0.05 * j + u.z % 7) + (u.w >> j % 24) % 28); }
        entries[i] = ShardEntry{at, height, width, (int)((begin + i) % 10), annotation, crc_32(0, pixels, bytes), 0};
        fwrite(pixels, 1, bytes, f);
        free(pixels);
        at += bytes;
    }
    h.file_bytes = at;
    h.crc = crc_32(crc_32(0, &h, offsetof(ShardHeader, crc)), entries, n * sizeof(ShardEntry));
    fseek(f, 0, SEEK_SET);
    fwrite(&h, sizeof(h), 1, f);
    fwrite(entries, sizeof(ShardEntry), n, f);
    fclose(f);
    free(entries);
}

static const char* in_folder(const char* name) {
    static char paths[4][200];
    static int n;
    char* path = paths[n++ % 4];
    snprintf(path, sizeof(paths[0]), "%s/%s", folder, name);
    return path;
}

// batches of 7 images of 24 x 24 from 10 classes, with crops and mirroring
static Model* classifier(void) {
    Model* model = model_new();
    model->B = 7;
    model->H = model->W = 24;
    model->CH = 3;
    model->V = 10;
    model->seed = 5;
    model->images->crop = model->images->flip = 1;
    return model;
}

// the bytes, labels and flips of `count` batches from `first` on: a checksum of each batch. late: of a set that is
// verified when it is read; damaged: an image of its last shard whose checksum is another then
static void run_loader(uint32_t* sums, const char* path, Model* model, bool training, size_t first, size_t count, int readers, bool small_pieces,
                       bool compare, bool late = false, int damaged = -1) {
    const size_t B = model->B, S = model->H, CH = model->CH;
    ImageData* d = model->images;
    Augmenter augmenter = {}; // nothing is augmented here
    d->augmenter = &augmenter;
    model->s->threads = readers;
    Loader* loader = loader_new(path, model, training);
    const ShardSet set = loader->set;
    const bool resizes = loader->resizes;
    Shard* last = &loader->set.shards[set.num_shards - 1];
    ShardEntry* entries = (ShardEntry*)malloc(last->header->images * sizeof(ShardEntry));
    memcpy(entries, last->entries, last->header->images * sizeof(ShardEntry));
    last->entries = entries;
    if (late) { loader->set.verified = false; }
    if (damaged >= 0) { entries[damaged].crc ^= 1; }
    if (small_pieces) {
        loader->piece_bytes = resizes ? align_up(84000) : loader->piece_bytes;
        loader->group_bytes = 20000;
    }
    const size_t pixels = numel(S, S, CH);
    cudaCheck(cudaMalloc(&d->images, B * pixels));
    cudaCheck(cudaMalloc(&d->labels, B * sizeof(int)));
    cudaCheck(cudaMalloc(&d->flips, B * sizeof(int)));
    if (resizes) {
        cudaCheck(cudaMalloc(&d->staging, loader->piece_bytes));
        cudaCheck(cudaMalloc(&d->tasks, B * sizeof(ResizeTask)));
    }
    if (d->erase > 0.0) { cudaCheck(cudaMalloc(&d->erased, B * sizeof(EraseBox))); }
    EraseBox* boxes = (EraseBox*)calloc(B, sizeof(EraseBox));
    size_t erased = 0;
    uint8_t *images = (uint8_t*)malloc(B * pixels), *expected = (uint8_t*)malloc(pixels);
    int *labels = (int*)malloc(B * sizeof(int)), *flips = (int*)malloc(B * sizeof(int));
    loader_start(loader, model);
    const size_t batches = loader_batches(loader);
    check(loader_first(loader) == 0, "the first batch of a loader");
    Difference difference = {};
    bool right = true;
    for (size_t batch = first; batch < first + count; batch++) {
        loader_batch(loader, batch);
        const Batch* taken = loader_take(loader);
        const size_t n = taken->n;
        cudaCheck(cudaStreamSynchronize(main_stream));
        const BatchAugment a = taken->augment;
        BatchAugment mix = {};
        mix.lam = 1.0f;
        if (training) { draw_mix(&mix, d, model->seed, (unsigned)batch, (int)S); }
        if (a.erased != NULL) { cudaCheck(cudaMemcpy(boxes, a.erased, n * sizeof(EraseBox), cudaMemcpyDeviceToHost)); }
        right = right && a.lam == mix.lam && (mix.lam == 1.0f || (a.cut == mix.cut && a.top == mix.top && a.right == mix.right));
        right = right && loader_first(loader) == batch + 1 && a.erased == d->erased && a.n == (int)n &&
                a.place == loader_place(loader, batch % batches, 0) && a.place_step == loader_place(loader, batch % batches, 1) - a.place &&
                taken->stats.mean[0] == 0.5f && taken->stats.std[0] == 0.25f && taken->images == d->images;
        cudaCheck(cudaMemcpy(images, d->images, n * pixels, cudaMemcpyDeviceToHost));
        cudaCheck(cudaMemcpy(labels, d->labels, n * sizeof(int), cudaMemcpyDeviceToHost));
        cudaCheck(cudaMemcpy(flips, d->flips, n * sizeof(int), cudaMemcpyDeviceToHost));
        batch_used(taken);
        sums[batch - first] = crc_32(crc_32(crc_32(0, images, n * pixels), labels, n * sizeof(int)), flips, n * sizeof(int));
        for (size_t i = 0; compare && i < n; i++) {
            unsigned* order = (unsigned*)malloc(set.images * sizeof(unsigned));
            const size_t place = loader_place(loader, batch % batches, i);
            shuffle(order, set.images, model->seed, (unsigned)(batch / batches));
            const unsigned image = training ? order[place % (set.images * d->repeats) / d->repeats] : (unsigned)place;
            free(order);
            const ReadJob job = set_image(&set, image);
            const ShardEntry* e = job.entry;
            ImageView v = loader_view(loader, e, (unsigned)(batch / batches), place);
            right = right && labels[i] == (int)(image % 10) && flips[i] == (!resizes && v.mirror);
            const EraseBox box = draw_erase(d->erase, model->seed, (unsigned)(batch / batches), place, (int)S);
            right = right && (a.erased == NULL || memcmp(&box, &boxes[i], sizeof(box)) == 0);
            erased += boxes[i].height > 0;
            if (!resizes) { v.mirror = false; }
            plain_view(expected, job.record, e->width, &v, S, CH);
            add_difference(&difference, images + i * pixels, expected, pixels);
        }
    }
    if (compare) {
        check(right, "labels, flips, places, boxes and mixing of S %zu, crop %d", S, d->crop);
        check((erased > 0) == (d->erase > 0.0), "%zu images are erased", erased);
        check(difference.equal >= 0.999 * difference.pixels && difference.largest <= 1, "loaded images, S %zu, crop %d: %zu of %zu bytes equal, largest difference %d",
              S, d->crop, difference.equal, difference.pixels, difference.largest);
    }
    loader_close(loader);
    free(entries);
    free(boxes);
    cudaCheck(cudaFree(d->erased));
    cudaCheck(cudaFree(d->images));
    cudaCheck(cudaFree(d->labels));
    cudaCheck(cudaFree(d->flips));
    cudaCheck(cudaFree(d->staging));
    cudaCheck(cudaFree(d->tasks));
    d->erased = NULL;
    d->staging = NULL;
    d->tasks = NULL;
    free(images);
    free(expected);
    free(labels);
    free(flips);
}

static void test_loader(bool quick) {
    ShardSet set = shards_open(in_folder("mixed"));
    check(set.num_shards == 3 && set.images == 61 && set.verified, "three shards of 61 images");
    for (unsigned i = 0; i < 61; i++) {
        const ReadJob job = set_image(&set, i);
        const unsigned number = (unsigned)(job.entry - job.shard->entries);
        check(job.shard == &set.shards[i < 20 ? 0 : i == 20 ? 1 : 2] && number == (i < 20 ? i : i == 20 ? 0 : i - 21), "image %u is number %u of its shard", i, number);
    }
    set = shards_open(in_folder("equal")); // equal.bin
    check(set.num_shards == 1 && set.images == 50, "a shard without a number");
    Model* variants[6];
    for (Model*& v : variants) { v = classifier(); }
    ImageData* mixed = variants[1]->images;
    mixed->repeats = 3;
    mixed->erase = 0.5;
    mixed->mixup = 0.8;
    mixed->cutmix = 1.0;
    mixed->mix = 0.9;
    variants[2]->images->crop = 0;  // training images of other sizes: the evaluation transform
    variants[2]->B = 30;            // more pieces in a batch than there are slots
    variants[3]->images->crop_pct = 0.875; // an evaluation
    variants[4]->s->accumulation = 3;
    variants[5]->H = variants[5]->W = 16; // images of the model's size, no crop: copied
    variants[5]->images->crop = 0;
    variants[5]->CH = 1;
    for (int v = 0; v < 6; v++) {
        const char* path = in_folder(v == 5 ? "equal" : "mixed");
        uint32_t all[32] = {}, again[32] = {};
        const size_t count = quick ? 12 : 20;
        run_loader(all, path, variants[v], v != 3, 0, count, 2, false, true);
        for (int readers : {0, 1, 2, 5}) {
            run_loader(again, path, variants[v], v != 3, 0, count, readers, true, false);
            check(memcmp(all, again, count * sizeof(uint32_t)) == 0, "variant %d: the same bits with %d readers and small pieces", v, readers);
        }
        run_loader(again, path, variants[v], v != 3, 5, count - 5, 2, true, false);
        check(memcmp(all + 5, again, (count - 5) * sizeof(uint32_t)) == 0, "variant %d: the same bits from batch 5 on", v);
        if (v != 3) { check(all[0] != all[9] && all[1] != all[10], "variant %d: another epoch has other batches", v); }
    }
    // ranks read disjoint parts; together every image of the epoch
    for (int training = 0; training < 2; training++) {
        int seen[61] = {};
        size_t sum = 0;
        unsigned order[61];
        Loader loader = {};
        loader.model = variants[0];
        loader.set.images = 61;
        loader.order = order;
        loader.repeats = 1;
        loader.ranks = 3;
        loader.training = training == 1;
        shuffle(order, 61, 5, 0);
        for (unsigned i = 0; i < 61 && !training; i++) { order[i] = i; }
        for (loader.rank = 0; loader.rank < 3; loader.rank++) {
            const size_t B = 7, batches = training ? 61 / 3 / B : CEIL_DIV(CEIL_DIV(61, B) - loader.rank, loader.ranks);
            check(loader_batches(&loader) == batches, "rank %zu has %zu batches", loader.rank, batches);
            for (size_t b = 0; b < batches; b++) {
                for (size_t i = 0; i < B && (training || loader_place(&loader, b, i) < 61); i++) { seen[loader_image(&loader, loader_place(&loader, b, i))]++; }
            }
        }
        bool once = true;
        for (int i = 0; i < 61; i++) {
            once = once && seen[i] <= 1;
            sum += seen[i];
        }
        check(once && sum == (training ? 42u : 61u), "three ranks read %zu images, each at most once", sum);
    }
    for (Model* v : variants) {
        free(v->images);
        model_free(v);
    }
}

// what ends with a sentence, in a process of its own: opens a set, or reads it as one too large to verify at once, whole or damaged
enum { READ_NONE, READ_LATE, READ_DAMAGED };
static void refused(const char* path, int how, int code, const char* pattern) {
    int ends[2];
    require(pipe(ends) == 0, "no pipe: %m");
    fflush(stdout);
    const pid_t pid = fork();
    if (pid == 0) {
        dup2(ends[1], 2);
        alarm(120);
        close(ends[0]);
        uint32_t sums[32];
        if (how != READ_NONE) {
            run_loader(sums, path, classifier(), true, 0, 9, 2, true, false, true, how == READ_DAMAGED ? 17 : -1);
        } else {
            shards_open(path);
        }
        _exit(0);
    }
    close(ends[1]);
    char text[2000];
    size_t n = 0;
    for (ssize_t got; n + 1 < sizeof(text) && (got = read(ends[0], text + n, sizeof(text) - 1 - n)) > 0; ) { n += got; }
    text[n] = 0;
    close(ends[0]);
    int status;
    waitpid(pid, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == code && (code == 0 || (strncmp(text, "error: ", 7) == 0 && strstr(text, pattern) != NULL &&
          strchr(text, '\n') == text + n - 1)),
          "%s: expected '%s', got status %d: %s", path, pattern, status, text);
}

static void copy_file(const char* from, const char* to, long flip) {
    char* bytes = (char*)malloc(1 << 24);
    FILE* f = fopen(from, "rb");
    const size_t n = fread(bytes, 1, 1 << 24, f);
    fclose(f);
    if (flip >= 0) { bytes[flip] ^= 1; }
    f = fopen(to, "wb");
    fwrite(bytes, 1, n, f);
    fclose(f);
    free(bytes);
}

static void make_sets(void) {
    write_shard(in_folder("mixed_00000.bin"), 0, 20, 5, 60, 3, 10);
    write_shard(in_folder("mixed_00001.bin"), 20, 1, 24, 24, 3, 10);
    write_shard(in_folder("mixed_00002.bin"), 21, 40, 20, 90, 3, 10);
    write_shard(in_folder("equal.bin"), 0, 50, 16, 16, 1, 10);
}

static void test_refused(void) {
    Shard shard = shard_open(in_folder("mixed_00002.bin"));
    const long pixel = (long)shard.entries[17].offset + 5;
    munmap((void*)shard.file.data, shard.file.bytes);
    copy_file(in_folder("mixed_00000.bin"), in_folder("bad_00000.bin"), -1);
    copy_file(in_folder("mixed_00002.bin"), in_folder("bad_00001.bin"), pixel);
    refused(in_folder("bad"), READ_NONE, 1, "bad_00001.bin: checksum of image 17 is");
    // found in a set that is not verified when it is opened, by the readers; and no complaint where nothing is damaged
    refused(in_folder("mixed"), READ_DAMAGED, 1, "mixed_00002.bin: checksum of image 17 is");
    refused(in_folder("mixed"), READ_LATE, 0, "");
    // a shard in the middle, or the first; one that has other classes, channels; a set that is being made
    copy_file(in_folder("mixed_00000.bin"), in_folder("gap_00000.bin"), -1);
    copy_file(in_folder("mixed_00001.bin"), in_folder("gap_00002.bin"), -1);
    refused(in_folder("gap"), READ_NONE, 1, "gap_00001.bin is not there, but 2 other shards");
    copy_file(in_folder("mixed_00001.bin"), in_folder("tail_00001.bin"), -1);
    refused(in_folder("tail"), READ_NONE, 1, "tail_00000.bin is not there, but 1 other shards");
    copy_file(in_folder("mixed_00000.bin"), in_folder("classes_00000.bin"), -1);
    write_shard(in_folder("classes_00001.bin"), 0, 3, 20, 30, 3, 11);
    refused(in_folder("classes"), READ_NONE, 1, "must agree");
    copy_file(in_folder("mixed_00000.bin"), in_folder("channels_00000.bin"), -1);
    write_shard(in_folder("channels_00001.bin"), 0, 3, 20, 30, 1, 10);
    refused(in_folder("channels"), READ_NONE, 1, "must agree");
    copy_file(in_folder("mixed_00000.bin"), in_folder("part_00000.bin"), -1);
    require(mkdir(in_folder("part.part"), 0777) == 0, "cannot make a directory: %m");
    refused(in_folder("part"), READ_NONE, 1, "not all made yet");
    refused(in_folder("nothing"), READ_NONE, 1, "cannot open");
    // PREFIX.bin and shards of that prefix: none is chosen unless it is named
    copy_file(in_folder("equal.bin"), in_folder("both.bin"), -1);
    copy_file(in_folder("equal.bin"), in_folder("both_00000.bin"), -1);
    refused(in_folder("both"), READ_NONE, 1, "both.bin is there, and 1 shards up to ");
    refused(in_folder("both.bin"), READ_NONE, 0, "");
    refused(in_folder("both_00000.bin"), READ_NONE, 0, "");
}

int main(int argc, char** argv) {
    bool quick = false;
    const char* path = "dev/reference/fixtures/resize.safetensors";
    for (int i = 1; i < argc; i++) { if (strcmp(argv[i], "-quick") == 0) { quick = true; } else { path = argv[i]; } }
    require(mkdtemp(folder) != NULL, "cannot make %s: %m", folder);
    make_sets();
    test_refused(); // before there are threads
    cudaCheck(cudaStreamCreate(&main_stream));
    Safetensors* st = safetensors_open(path);
    test_views(st);
    test_turn();
    test_choices(st);
    test_loader(quick);
    char command[100];
    snprintf(command, sizeof(command), "rm -r %s", folder);
    check(system(command) == 0, "%s", command);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
