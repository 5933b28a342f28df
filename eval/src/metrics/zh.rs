//! The same for Chinese, cut into words by jieba.

use super::rouge::rouge_l;
use super::token_f1::f1;
use jieba_rs::Jieba;
use std::sync::LazyLock;

static JIEBA: LazyLock<Jieba> = LazyLock::new(Jieba::new); // reads its dictionary once, in about a second

/// What is deleted beside ASCII punctuation.
const PUNCTUATION: &str = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.";

/// [`token_f1`](super::token_f1) of Chinese.
pub fn token_f1_zh(text: &str, reference: &str) -> f64 {
    let [text, reference] = [text, reference].map(|text| {
        let words = cut(text).into_iter().map(normal);
        words.filter(|word| !word.is_empty()).collect::<Vec<_>>()
    });
    f1(&text, &reference)
}

/// [`rouge_l`](super::rouge_l) of Chinese.
pub fn rouge_l_zh(text: &str, reference: &str) -> f64 {
    rouge_l(&cut(text).join(" "), &cut(reference).join(" "))
}

fn cut(text: &str) -> Vec<&str> {
    JIEBA.cut(text, true).into_iter().map(|token| token.word).collect()
}

pub(super) fn normal(word: &str) -> String {
    let kept =
        |c: &char| !c.is_ascii_punctuation() && !PUNCTUATION.contains(*c) && !super::is_space(*c);
    word.to_lowercase().chars().filter(kept).collect()
}
