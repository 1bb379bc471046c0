//! Embedding files of texts, and evaluation on test collections.

use std::collections::HashSet;
use std::num::NonZeroUsize;

use ndarray::{Array2, ArrayView2, s};

use super::{
    BeirDataset, EmbeddingWriter, Metrics, Run, SearchOptions, Searcher, Similarity, TextFile,
    evaluate, lines::excerpt,
};
use crate::text::Role;
use crate::{Error, ErrorKind, Result};

/// Number of texts that are passed to the embedder at a time: enough to sort by length into full batches, few
/// enough that memory does not grow with the collection.
pub const BLOCK_TEXTS: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// This number of different texts with equal embeddings is an error. Fewer may be equal after truncation.
const MAX_EQUAL: usize = 8;

/// Computes embeddings of texts.
pub trait Embedder {
    /// The dimension `d` of an embedding.
    fn dimension(&self) -> usize;

    /// Embeds texts: row i of the result `(texts, d)` belongs to text i.
    ///
    /// There may be thousands of texts of any length; the implementation divides them into batches.
    fn embed(&self, role: Role, texts: &[String]) -> Result<Array2<f32>>;
}

/// The progress of embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The role of the current texts. Of a collection, the queries are embedded first, then the passages.
    pub role: Role,
    /// Number of texts embedded so far.
    pub done: usize,
    /// Number of texts to embed.
    pub total: usize,
}

/// Embeds every text of a file into a file of embeddings: row i belongs to text i. Memory use is bounded.
///
/// Texts whose embeddings are already in the output are skipped. After every block but the last one,
/// [`EmbeddingWriter::keep`] is called, then `on_progress`. On an error the output path is unchanged.
///
/// # Errors
/// [`ErrorKind::Argument`]: the output has another shape; and the errors of the embedder, of reading
/// ([`TextFile::chunks`]) and of writing ([`EmbeddingWriter::append`]).
pub fn encode_stream(
    embedder: &(impl Embedder + ?Sized),
    role: Role,
    texts: &TextFile,
    output: EmbeddingWriter,
    on_progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    encode_blocks(embedder, (role, texts), output, BLOCK_TEXTS, on_progress)
}

/// The part of another process than the first one in [`encode_stream`] with a
/// [`SharedEmbedder`](super::SharedEmbedder), from text number `first`: it embeds its parts and writes nothing.
///
/// # Errors
/// Those of the embedder and of reading the texts.
pub fn take_part_in_encoding(
    embedder: &(impl Embedder + ?Sized),
    role: Role,
    texts: &TextFile,
    first: usize,
) -> Result<()> {
    for block in texts.chunks(BLOCK_TEXTS)?.skip_texts(first)? {
        embedder.embed(role, &block?)?;
    }
    Ok(())
}

/// [`encode_stream`] with any block size.
fn encode_blocks(
    embedder: &(impl Embedder + ?Sized),
    (role, texts): (Role, &TextFile),
    mut output: EmbeddingWriter,
    block: NonZeroUsize,
    on_progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    let expected = (texts.len(), embedder.dimension());
    if (output.rows(), output.cols()) != expected {
        return Err(Error::new(ErrorKind::Argument, "the output has another shape")
            .expected(format!("{expected:?}"))
            .got(format!("{:?}", (output.rows(), output.cols()))));
    }
    let mut progress = Progress { role, done: output.written(), total: texts.len() };
    for block in texts.chunks(block)?.skip_texts(progress.done)? {
        let block = block?;
        let embeddings = embed_checked(embedder, role, &block, progress.done)?;
        output.append(embeddings.as_standard_layout().as_slice().unwrap_or_default())?;
        progress.done += block.len();
        if progress.done < progress.total {
            output.keep()?;
        }
        on_progress(progress);
    }
    output.finish()
}

/// Embeds a test collection, searches it exactly and computes the metrics.
///
/// Passages are searched block by block, so only the embeddings of the queries and of one block of passages
/// are in memory. `on_progress` is called after every block.
///
/// # Errors
/// Those of the embedder and of [`Searcher`].
pub fn evaluate_dataset(
    embedder: &(impl Embedder + ?Sized),
    similarity: &(impl Similarity + ?Sized),
    dataset: &BeirDataset,
    options: SearchOptions,
    on_progress: &mut dyn FnMut(Progress),
) -> Result<(Metrics, Run)> {
    let (query_ids, query_texts) = (&dataset.queries.ids, &dataset.queries.texts);
    let mut queries = Array2::zeros((query_texts.len(), embedder.dimension()));
    for_each_block(embedder, Role::Query, query_texts, on_progress, |start, block| {
        queries.slice_mut(s![start..start + block.nrows(), ..]).assign(&block);
        Ok(())
    })?;
    let mut searcher = Searcher::new(query_ids, queries.view(), &dataset.corpus.ids, options)?;
    for_each_block(embedder, Role::Passage, &dataset.corpus.texts, on_progress, |_, block| {
        searcher.add(similarity, block.view())
    })?;
    let run = searcher.finish()?;
    Ok((evaluate(&run, &dataset.qrels), run))
}

/// Embeds texts block by block and calls `take` with the index of each block's first text and its embeddings.
fn for_each_block(
    embedder: &(impl Embedder + ?Sized),
    role: Role,
    texts: &[String],
    on_progress: &mut dyn FnMut(Progress),
    mut take: impl FnMut(usize, Array2<f32>) -> Result<()>,
) -> Result<()> {
    let mut progress = Progress { role, done: 0, total: texts.len() };
    for block in texts.chunks(BLOCK_TEXTS.get()) {
        take(progress.done, embed_checked(embedder, role, block, progress.done)?)?;
        progress.done += block.len();
        on_progress(progress);
    }
    Ok(())
}

/// Embeds any number of texts and checks the embeddings. Row i of the result `(texts, d)` belongs to text i.
///
/// # Errors
/// Those of the embedder; [`ErrorKind::Backend`]: it returns another shape; [`ErrorKind::Numeric`]: an
/// embedding is not finite or is zero, or all of 8 or more different texts have the same embedding.
pub fn embed_texts(
    embedder: &(impl Embedder + ?Sized),
    role: Role,
    texts: &[String],
) -> Result<Array2<f32>> {
    let mut embeddings = Array2::zeros((texts.len(), embedder.dimension()));
    for_each_block(embedder, role, texts, &mut |_| (), |start, block| {
        embeddings.slice_mut(s![start..start + block.nrows(), ..]).assign(&block);
        Ok(())
    })?;
    Ok(embeddings)
}

/// Embeds texts and checks the shape and the values of the result. `first` is the number of the first text.
fn embed_checked(
    embedder: &(impl Embedder + ?Sized),
    role: Role,
    texts: &[String],
    first: usize,
) -> Result<Array2<f32>> {
    let embeddings = embedder.embed(role, texts)?;
    let expected = (texts.len(), embedder.dimension());
    if embeddings.dim() != expected {
        return Err(Error::new(ErrorKind::Backend, "the embedder returned the wrong shape")
            .expected(format!("{expected:?}"))
            .got(format!("{:?}", embeddings.dim())));
    }
    check_values(embeddings.view(), role, texts, first)?;
    Ok(embeddings)
}

/// Rejects embeddings that only a damaged model computes.
fn check_values(
    embeddings: ArrayView2<f32>,
    role: Role,
    texts: &[String],
    first: usize,
) -> Result<()> {
    for (i, (embedding, text)) in embeddings.rows().into_iter().zip(texts).enumerate() {
        let bad = |what: &str| {
            let number = first + i + 1;
            let what = format!("the embedding of {role} {number} (counted from 1) {what}");
            Error::new(ErrorKind::Numeric, what)
        };
        if let Some(value) = embedding.iter().find(|x| !x.is_finite()) {
            return Err(bad("is not finite").got(format!("{value} for {:?}", excerpt(text))).hint(
                "the model computes numbers that are too large: check its weights, and rope_theta and \
                 rms_norm_eps in config.json; with bf16, try --dtype f32",
            ));
        }
        if embedding.iter().all(|&x| x == 0.0) {
            return Err(bad("is zero").got(format!("only zeros for {:?}", excerpt(text))).hint(
                "the model's weights are zero, damaged or too large: download or export the model again",
            ));
        }
    }
    let (Some(same), true) = (embeddings.rows().into_iter().next(), texts.len() >= MAX_EQUAL)
    else {
        return Ok(());
    };
    if embeddings.rows().into_iter().all(|row| row == same) {
        let distinct = texts.iter().collect::<HashSet<_>>().len();
        if distinct >= MAX_EQUAL {
            let what = format!("{distinct} different texts ({role}) have the same embedding");
            return Err(Error::new(ErrorKind::Numeric, what).expected("different embeddings").hint(
                "check that the weights are not damaged, and that the maximum length does not truncate \
                 all texts to the same few tokens",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use ndarray::ShapeBuilder;

    use super::*;
    use crate::retrieval::{Origin, Qrels, TextTable, read_embeddings};

    /// Embeds a text as its number and 1, in column-major order; records the block sizes.
    #[derive(Default)]
    struct Numbers(RefCell<Vec<(Role, usize)>>);

    impl Embedder for Numbers {
        fn dimension(&self) -> usize {
            2
        }

        fn embed(&self, role: Role, texts: &[String]) -> Result<Array2<f32>> {
            self.0.borrow_mut().push((role, texts.len()));
            let shape = (texts.len(), 2).f();
            Ok(Array2::from_shape_fn(
                shape,
                |(i, j)| {
                    if j == 0 { texts[i].parse().unwrap() } else { 1.0 }
                },
            ))
        }
    }

    struct Wrong;
    impl Embedder for Wrong {
        fn dimension(&self) -> usize {
            2
        }

        fn embed(&self, _: Role, texts: &[String]) -> Result<Array2<f32>> {
            Ok(Array2::zeros((texts.len() - 1, 2)))
        }
    }

    struct Dot;
    impl Similarity for Dot {
        fn block(&self, q: ArrayView2<f32>, p: ArrayView2<f32>) -> Result<Array2<f32>> {
            Ok(q.dot(&p.t()))
        }
    }

    fn table(prefix: &str, texts: impl Iterator<Item = usize>) -> TextTable {
        let texts: Vec<String> = texts.map(|text| text.to_string()).collect();
        TextTable { ids: texts.iter().map(|text| format!("{prefix}{text}")).collect(), texts }
    }

    #[test]
    fn rows_follow_the_order_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (input, output) = (dir.path().join("texts.txt"), dir.path().join("v.npy"));
        let n = BLOCK_TEXTS.get() + 10;
        let texts: String = (0..n).map(|i| format!("{}\n", i * 7 % n)).collect();
        std::fs::write(&input, texts).unwrap();
        let file = TextFile::open(&input).unwrap();
        let (embedder, mut seen) = (Numbers::default(), Vec::new());
        let writer = EmbeddingWriter::create(&output, file.len(), 2).unwrap();
        let mut on_progress = |p: Progress| seen.push((p.done, p.total));
        encode_stream(&embedder, Role::Passage, &file, writer, &mut on_progress).unwrap();
        let expected =
            Array2::from_shape_fn((n, 2), |(i, j)| if j == 0 { (i * 7 % n) as f32 } else { 1.0 });
        assert_eq!(read_embeddings(&output).unwrap(), expected);
        assert_eq!(seen, [(BLOCK_TEXTS.get(), n), (n, n)]);
        assert_eq!(*embedder.0.borrow(), [(Role::Passage, BLOCK_TEXTS.get()), (Role::Passage, 10)]);
    }

    /// Embeds like [`Numbers`], and fails after a number of blocks.
    struct Failing(Numbers, usize);

    impl Embedder for Failing {
        fn dimension(&self) -> usize {
            2
        }

        fn embed(&self, role: Role, texts: &[String]) -> Result<Array2<f32>> {
            if self.0.0.borrow().len() == self.1 {
                return Err(Error::new(ErrorKind::Backend, "the device failed"));
            }
            self.0.embed(role, texts)
        }
    }

    #[test]
    fn interrupted_after_any_block_and_resumed_the_file_is_the_same() {
        const BLOCK: NonZeroUsize = NonZeroUsize::new(3).unwrap();
        for texts in [1usize, 3, 4, 11, 12] {
            let dir = tempfile::tempdir().unwrap();
            let (input, output) = (dir.path().join("texts.txt"), dir.path().join("v.npy"));
            std::fs::write(&input, (0..texts).map(|i| format!("{i}\n")).collect::<String>())
                .unwrap();
            let file = TextFile::open(&input).unwrap();
            let encode = |embedder: &dyn Embedder, seen: &mut Vec<usize>| {
                let writer = EmbeddingWriter::resume(&output, texts, 2, Origin::new())?;
                let mut on_progress = |p: Progress| seen.push(p.done);
                encode_blocks(embedder, (Role::Query, &file), writer, BLOCK, &mut on_progress)
            };
            encode(&Numbers::default(), &mut Vec::new()).unwrap();
            let whole = std::fs::read(&output).unwrap();
            std::fs::remove_file(&output).unwrap();
            for done in 0..texts.div_ceil(BLOCK.get()) {
                let mut seen = Vec::new();
                encode(&Failing(Numbers::default(), done), &mut seen).unwrap_err();
                assert_eq!(EmbeddingWriter::kept(&output).unwrap_or(0), done * BLOCK.get());
                assert!(!output.exists());
                encode(&Numbers::default(), &mut seen).unwrap();
                let ends = (1..).map(|i| (i * BLOCK.get()).min(texts));
                assert_eq!(seen, ends.take(texts.div_ceil(BLOCK.get())).collect::<Vec<_>>());
                assert_eq!(std::fs::read(&output).unwrap(), whole);
                std::fs::remove_file(&output).unwrap();
                assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
            }
        }
    }

    /// Embeds a text as the numbers in it.
    struct Parsed;
    impl Embedder for Parsed {
        fn dimension(&self) -> usize {
            2
        }

        fn embed(&self, _: Role, texts: &[String]) -> Result<Array2<f32>> {
            let numbers = texts.iter().flat_map(|text| text.split(' ').take(2));
            let numbers: Vec<f32> = numbers.map(|word| word.parse().unwrap()).collect();
            Ok(Array2::from_shape_vec((texts.len(), 2), numbers).unwrap())
        }
    }

    #[test]
    fn embeddings_of_a_broken_model_are_refused() {
        let embed = |texts: Vec<String>| embed_texts(&Parsed, Role::Passage, &texts);
        let many = |text: &str| (0..9).map(|i| format!("{text} {i}")).collect::<Vec<_>>();
        let error = |texts: Vec<String>| {
            let error = embed(texts).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Numeric);
            error.to_string()
        };
        for (bad, expected) in
            [("NaN 1", "is not finite"), ("1 -inf", "is not finite"), ("0 -0", "is zero")]
        {
            let mut texts: Vec<String> = (0..BLOCK_TEXTS.get()).map(|i| format!("1 {i}")).collect();
            texts.extend(["1 2".to_owned(), bad.to_owned()]);
            let error = error(texts);
            assert!(
                error.contains(&format!("passage 4098 (counted from 1) {expected}")),
                "{error}"
            );
            assert!(error.contains(&format!("{bad:?}")) && error.contains("hint"), "{error}");
        }
        assert!(error(many("1 2")).contains("9 different texts"));
        assert_eq!(embed(vec!["1 2".into(); 9]).unwrap().nrows(), 9);
        assert_eq!(embed(many("1 2")[..7].to_vec()).unwrap().nrows(), 7);
        let mut texts = many("1 2");
        texts.push("2 2".into());
        assert_eq!(embed(texts).unwrap().nrows(), 10);
    }

    #[test]
    fn wrong_shapes_are_refused_and_leave_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let (input, output) = (dir.path().join("texts.txt"), dir.path().join("v.npy"));
        std::fs::write(&input, "1\n2\n").unwrap();
        let file = TextFile::open(&input).unwrap();
        let encode = |embedder: &dyn Embedder, rows| {
            let writer = EmbeddingWriter::create(&output, rows, 2).unwrap();
            encode_stream(embedder, Role::Query, &file, writer, &mut |_| {}).unwrap_err().kind()
        };
        assert_eq!(encode(&Wrong, 2), ErrorKind::Backend);
        assert_eq!(encode(&Numbers::default(), 3), ErrorKind::Argument);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_collection_is_embedded_searched_and_scored() {
        let n = BLOCK_TEXTS.get() + 2;
        let mut qrels = Qrels::default();
        qrels.insert("q1", &format!("d{}", n - 1), 1); // the greatest product with a positive query
        qrels.insert("q2", &format!("d{}", n - 2), 1); // the second
        let corpus = table("d", 0..n);
        let dataset = BeirDataset { corpus, queries: table("q", 1..3), qrels };
        let mut seen = Vec::new();
        let options = SearchOptions { top_k: 5, ..SearchOptions::default() };
        let (metrics, run) =
            evaluate_dataset(&Numbers::default(), &Dot, &dataset, options, &mut |p| seen.push(p))
                .unwrap();
        assert_eq!(run.rankings()[0].hits.len(), 5);
        assert_eq!((metrics.queries, metrics.mrr_at_10, metrics.recall_at_10), (2, 0.75, 1.0));
        assert_eq!(seen.first().unwrap(), &Progress { role: Role::Query, done: 2, total: 2 });
        assert_eq!(seen.last().unwrap(), &Progress { role: Role::Passage, done: n, total: n });
    }
}
